"""Liger's kernels in the trunk: equal to the plain modules on a GPU, refused elsewhere."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pl_attnedit.distillation.liger import use_liger
from pl_attnedit.errors import UserError

Make = Callable[..., PreTrainedModel]
installed = importlib.util.find_spec("liger_kernel") is not None
on_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and installed), reason="no GPU, or no Liger")


def test_refused_without_liger_or_gpu(make_teacher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a CUDA GPU, this run is on cpu"):
        use_liger(make_teacher("llama"), torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pl_attnedit\[gpu\]'"):
        use_liger(make_teacher("llama"), torch.device("cuda"))


@on_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_the_plain_modules(make_teacher: Make, family: str, grad: bool) -> None:
    plain = make_teacher(family).cuda()
    fast = copy.deepcopy(plain)
    use_liger(fast, torch.device("cuda"))
    ids = torch.randint(plain.config.vocab_size, (2, 24), device="cuda")
    weights = torch.randn(2, 24, plain.config.vocab_size, device="cuda")
    with torch.set_grad_enabled(grad):
        ours, theirs = fast(ids).logits, plain(ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    if grad:
        for logits in (ours, theirs):
            (logits * weights).sum().backward()
        for (name, a), b in zip(fast.named_parameters(), plain.parameters()):
            scale = b.grad.abs().max() if b.grad is not None else 0
            assert a.grad is None or (a.grad - b.grad).abs().max() <= 1e-3 * scale + 1e-6, name


@on_gpu
def test_the_other_tensors_of_the_process_keep_the_plain_rotary(make_teacher: Make) -> None:
    model = make_teacher("llama")
    ids = torch.randint(model.config.vocab_size, (1, 8))
    with torch.no_grad():
        before = model(ids).logits
        use_liger(make_teacher("llama").cuda(), torch.device("cuda"))
        torch.testing.assert_close(model(ids).logits, before)
