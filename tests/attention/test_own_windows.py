"""Windows of the teacher's own layers by our kernels: equal to Hugging Face's, and without a mask of all pairs of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from any_family import ROWS
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pl_attnedit import GateSWAConfig, edit_model
from pl_attnedit.attention import interface
from pl_attnedit.attention.kernels import windowed
from pl_attnedit.attention.own_windows import NAME, use_own_windows, with_blocks
from pl_attnedit.distillation.engine import operations
from pl_attnedit.distillation.engine.decoder import final_norm
from pl_attnedit.distillation.engine.pairs import Pairs
from pl_attnedit.modeling.edit import load

Ids = Callable[..., torch.Tensor]
Make = Callable[..., PreTrainedModel]
WITH_WINDOWS = sorted(row for row, fields in ROWS.items() if "sliding_window" in fields)


class Largest(TorchDispatchMode):
    """The largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, tuple | list) else [output]:
            self.elements = max(self.elements, each.numel() if isinstance(each, torch.Tensor) else 0)
        return output


def loss(model: Any, **batch: torch.Tensor) -> torch.Tensor:
    """Of the tokens that are no padding."""
    logits = model(**batch, use_cache=False).logits
    return logits[batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()].float().logsumexp(-1).sum()


@pytest.mark.parametrize("name", [NAME, interface.NAME])
def test_arguments_may_be_named(name: str) -> None:
    """As AFMoE names the mask."""
    expected, found = (inspect.signature(ALL_ATTENTION_FUNCTIONS[each]).parameters for each in ("sdpa", name))
    assert list(found)[:5] == list(expected)[:5]


@pytest.mark.parametrize("row", WITH_WINDOWS)
def test_equal_hugging_faces(row: str, make_teacher: Make, make_ids: Ids) -> None:
    """Whole texts, with padding, packed documents, and generation."""
    theirs, ours, ids = make_teacher(row), make_teacher(row), make_ids(2, 40)
    use_own_windows(ours.model)
    assert ours.model.config._attn_implementation == NAME
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    real = torch.ones_like(ids)
    real[0, :9] = 0
    places = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    for given in ({}, {"attention_mask": real}, {"position_ids": places}):
        found = [loss(model, input_ids=ids, **given) for model in (theirs, ours)]
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
        gradients = [
            torch.autograd.grad(each, list(model.parameters()), allow_unused=True)
            for each, model in zip(found, (theirs, ours))
        ]
        for wanted, gradient in zip(*gradients):
            if wanted is not None:
                torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)
    texts = [model.generate(ids[:, :20], max_new_tokens=10, do_sample=False) for model in (theirs, ours)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("row", ["mistral, windows", "gemma3_text", "gpt_oss"])
def test_no_mask_of_all_pairs(row: str, make_teacher: Make, make_ids: Ids, tmp_path: Any) -> None:
    """In teacher, student and saved student, evaluated and trained."""
    teacher, ids = make_teacher(row), make_ids(1, 300)
    student = edit_model(teacher, GateSWAConfig(4), layers=[0])
    student.save_pretrained(tmp_path)
    for model in (teacher, student, load(tmp_path)):
        with Largest() as made:
            model.model(input_ids=ids, use_cache=True)
        assert made.elements < 300**2
    pairs = Pairs(teacher, student)
    with Largest() as made:
        entered, own, calls = pairs.begin({"input_ids": ids})
        for pair, call in pairs.with_calls(calls):
            states, own = pair(entered, own, call)
            entered = states.output
        own.sum().backward()
    assert made.elements < 300**2


@pytest.mark.parametrize("row", ["gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_a_compiled_layer_is_one_graph(
    row: str, make_teacher: Make, make_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flex_attention, as on GPUs."""
    monkeypatch.setattr(windowed, "_takes_flex", lambda query: torch.compiler.is_compiling())
    monkeypatch.setattr(operations, "compile_whole", partial(torch.compile, dynamic=False, backend="eager"))
    teacher, ids = make_teacher(row), make_ids(1, 300)
    wanted = teacher.model(input_ids=ids).last_hidden_state
    pairs = Pairs(teacher, edit_model(teacher, GateSWAConfig(None), pattern="S"), compiled=True)
    entered, own, calls = pairs.begin({"input_ids": ids})
    calls = [with_blocks(call, "cpu") for call in calls]
    counters.clear()
    for pair, call in pairs.with_calls(calls):
        states, own = pair(entered, own, call)
        entered = states.output
    assert not counters["graph_break"]
    torch.testing.assert_close(final_norm(teacher.model)(entered), wanted, atol=1e-4, rtol=1e-4)
