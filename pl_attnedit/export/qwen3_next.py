"""States beside full layers, of a dense Qwen3, as a stock Qwen3-Next checkpoint.

Gated DeltaNet has the names and shapes of that model. Its full layers have QK-norm and a gate for each value: they get gates
of 1/2, and output weights of twice the size. Norms are stored as weight - 1, but not that of a state. vLLM's class wants a
layer with experts: the last one has its MLP as the shared expert, with a gate of 1/2 too, and one routed expert of a few
kilobytes whose weights are zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pl_attnedit.attention import GatedDeltaNetConfig
from pl_attnedit.errors import UserError
from pl_attnedit.export.checks import plan_of, refuse_unless, targets_of, teacher_type
from pl_attnedit.export.granite_swa import COPIED_FIELDS
from pl_attnedit.modeling.plan import FULL
from pl_attnedit.teachers import attention_spec

FORMAT = "qwen3_next"
EXPERT = 32  # the width of the routed expert


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves weights, config.json and generation_config.json into `folder`.

    Raises:
        UserError: for what Qwen3-Next cannot express.
    """
    from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM  # Triton too, where that is

    state, spec = state_of(student), attention_spec(student.config)
    heads, key_dim, value_dim = state.shape(spec)
    plan = plan_of(student)
    recurrent = [isinstance(target, GatedDeltaNetConfig) for target in map(plan.target_of, range(len(plan.letters)))]
    fields = {name: getattr(student.config, name) for name in COPIED_FIELDS}
    fields["rope_parameters"] = {**fields["rope_parameters"], "partial_rotary_factor": 1.0}
    config = Qwen3NextConfig(
        **fields,
        head_dim=spec.head_dim,
        layer_types=["linear_attention" if each else "full_attention" for each in recurrent],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=state.conv_kernel,
        num_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=EXPERT,
        shared_expert_intermediate_size=student.config.intermediate_size,
        mlp_only_layers=list(range(len(recurrent) - 1)),
        dtype=student.dtype,
    )
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config)
    weights = stock_weights(student, recurrent)
    for name, empty in model.state_dict().items():
        if name not in weights and ".mlp." in name:
            weights[name] = torch.zeros_like(empty, device="cpu", dtype=student.dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = student.generation_config
    model.save_pretrained(folder)


def state_of(student: PreTrainedModel) -> GatedDeltaNetConfig:
    """The target of all state layers; `UserError` for what Qwen3-Next cannot express, with what would allow it."""
    kind, spec, config = teacher_type(student), attention_spec(student.config), student.config
    if kind != "qwen3":
        raise UserError(f"{FORMAT}: a {kind} teacher cannot be expressed, full layers have QK-norm; dense Qwen3 can")
    states = targets_of(student, GatedDeltaNetConfig, FORMAT, "every layer must be gated_deltanet or full").values()
    for state in states:
        refuse_unless(not state.rope, FORMAT, "rope", state.rope, "convert with rope: false")
    shapes = {(*state.shape(spec), state.conv_kernel) for state in states}
    refuse_unless(len(shapes) == 1, FORMAT, "shapes", sorted(shapes), "all states must be of one shape")
    letters = plan_of(student).letters
    refuse_unless(FULL in letters, FORMAT, "pattern", letters, "transformers' class wants a full layer")
    refuse_unless(
        not config.attention_bias, FORMAT, "attention_bias", True, "it needs a teacher without attention biases"
    )
    refuse_unless(config.hidden_act == "silu", FORMAT, "hidden_act", config.hidden_act, "it needs a teacher with silu")
    return next(iter(states))


def stock_weights(student: PreTrainedModel, recurrent: list[bool]) -> dict[str, Tensor]:
    """The student's weights under Qwen3-Next's names."""
    spec, weights = attention_spec(student.config), {}
    last = f"model.layers.{len(recurrent) - 1}.mlp."
    for name, tensor in student.state_dict().items():
        weight = tensor.detach()
        if ".self_attn." in name and recurrent[int(name.split(".")[2])]:
            name = name.replace(".self_attn.", ".linear_attn.")
        elif name.endswith("norm.weight"):
            weight = weight - 1
        elif name.endswith(".q_proj.weight"):  # each head's queries, then its gate
            queries = weight.unflatten(0, (spec.num_heads, -1))
            weight = torch.cat([queries, torch.zeros_like(queries)], dim=1).flatten(0, 1)
        elif name.endswith(".o_proj.weight") or name == last + "down_proj.weight":
            weight = 2 * weight
        weights[name.replace(last, last + "shared_expert.")] = weight
    return weights
