"""Whether `Pairs` runs a family's decoder as Hugging Face does: one short sequence through both, a layer at a time.

A block that scales its residuals, norms its outputs or shares a norm would train to something else without a word. So would
an attention that turns or scales other than the targets do, which are made of its projections.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pl_attnedit.attention import GateSWA
from pl_attnedit.attention.interface import heads_of, with_interface
from pl_attnedit.attention.own_windows import attend_as_teacher
from pl_attnedit.distillation.engine.decoder import Call, final_norm
from pl_attnedit.distillation.engine.pairs import Pairs
from pl_attnedit.errors import UserError
from pl_attnedit.modeling import edited_attention
from pl_attnedit.teachers import output_projection

TOKENS = 8  # so few that even a model of 30B parameters takes seconds on a CPU, where the weights' way decides


@torch.no_grad()
def check_forward(teacher: Any, student: Any) -> None:
    """Compares teacher and student, where their weights are, with Hugging Face's own forward passes of them. Each layer gets
    what Hugging Face's got, so a difference is of that layer alone.

    Raises:
        UserError: a difference beyond rounding, with the layer.
    """
    pairs = Pairs(teacher, student)
    ids = torch.arange(TOKENS, device=teacher.model.embed_tokens.weight.device)[None] % teacher.config.vocab_size
    dtypes = {parameter.dtype for model in (teacher, student) for parameter in model.parameters()}
    several = len(dtypes) > 1  # only mixed precision runs those
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest":
        coarsest = max(coarsest, 2**-10)  # of TensorFloat32
    share = max(8 * coarsest, 1e-5)  # of the values: kernels may round differently
    with torch.autocast(ids.device.type, torch.bfloat16) if several else nullcontext():
        theirs = {"teacher": _own_forward(teacher, ids), "student": _own_forward(student, ids)}
        (first, of_teacher), (second, of_student) = theirs.values()
        *embedded, calls = pairs.begin({"input_ids": ids})
        for role, ours, states in zip(theirs, embedded, (first, second)):
            _compare(f"the embeddings of the {role}", share, ours, states[0])
        for index, (pair, call) in enumerate(pairs.with_calls(calls)):
            of_pair, left = pair(first[index], second[index], call)
            for role, ours, states in (("teacher", of_pair.output, first), ("student", left, second)):
                _compare(f"layer {index} of the {role}", share, ours, states[index + 1], states[index])
            target = edited_attention(student).get(index)
            if target is not None and target.makes_scores:
                attention = teacher.model.layers[index].self_attn
                ours = _attention(target, attention, of_pair.attention_input, of_pair.attention_call)
                _compare(f"the attention of layer {index} of the teacher", share, ours, of_pair.attention_output)

        def logits(student: Tensor, teacher: Tensor, student_head: nn.Module, teacher_head: nn.Module) -> None:
            _compare("the head of the teacher", share, teacher_head(teacher[0]), of_teacher[0])
            _compare("the head of the student", share, student_head(student[0]), of_student[0])

        pairs.heads(first[-1], second[-1], logits)


def _attention(target: Any, attention: Any, entered: Tensor, call: Call) -> Tensor:
    """What a target takes the teacher's attention for: (batch, time, hidden)."""
    ours = isinstance(target, GateSWA)
    gate = 0.5 if ours and target.target.gate != "none" else 1.0  # as at the start; the projection makes up for it

    def scores(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any) -> Tensor:
        known = (given.get("s_aux"), given.get("softcap")) if ours else ()
        output = attend_as_teacher(
            query, key, value, attention_mask, given.get("scaling") or target.spec.scaling, *known
        )
        return gate * output.unflatten(-1, (query.shape[1], -1))

    projection = output_projection(attention)
    if ours:
        bias = 0.0 if projection.bias is None else projection.bias
        output = with_interface(attention, scores).forward(hidden_states=entered, **call)[0]
        return (output - bias) / gate + bias
    query, key, value, options = heads_of(attention, entered, call)
    return projection(scores(query, key, value, call["attention_mask"], **options).flatten(2))


def _own_forward(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What enters each layer and what leaves the last, (1, time, hidden) each, and the logits (1, time, vocabulary)."""
    states: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[module] = args[0] if args else kwargs["hidden_states"]  # the last time: norms may be used twice

    watched = [*model.model.layers, final_norm(model.model)]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        return [states[module] for module in watched], logits
    finally:
        for handle in handles:
            handle.remove()


def _compare(where: str, share: float, ours: Tensor, theirs: Tensor, entered: Tensor | None = None) -> None:
    ours, theirs = ours.float(), theirs.float()
    update = theirs if entered is None else theirs - entered.float()
    allowed = share * (theirs.abs() + update.abs().max())
    if bool(((ours - theirs).abs() > allowed).any()):
        off = float((ours - theirs).norm() / update.norm())
        raise UserError(
            f"{where}: what is run here is off by {off:.1%} from Hugging Face's own forward pass; this decoder does more "
            "than pl_attnedit knows of, and would be trained to something else"
        )
