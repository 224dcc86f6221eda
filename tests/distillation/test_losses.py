from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pl_attnedit.distillation.losses import ChunkedKL, chunk_terms, chunk_terms_in_cache, cosine_distance, nmse
from pl_attnedit.distillation.metrics import Fidelity, LayerNMSE

ALL, SOME = torch.ones(3, 7, dtype=torch.bool), torch.arange(21).view(3, 7) % 3 == 0


def plain_kl(student: torch.Tensor, teacher: torch.Tensor, head: nn.Linear, other: nn.Linear, mask: torch.Tensor):
    p, q = other(teacher).double().softmax(-1), head(student).double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)[mask].mean()


def test_nmse_is_the_error_over_the_energy() -> None:
    prediction, target = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 5)
    expected = ((prediction - target) ** 2).sum() / (target**2).sum()
    loss = nmse(prediction, target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, plain = torch.autograd.grad(loss, prediction)[0], torch.autograd.grad(expected, prediction)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [ALL, SOME])
def test_cosine_distance(mask: torch.Tensor) -> None:
    student, teacher = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 5)
    cosine = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    expected = (1 - cosine)[mask].mean()
    loss = cosine_distance(student, teacher, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, plain = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 21, 1024])
@pytest.mark.parametrize("mask", [ALL, SOME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_kl_is_the_plain_one(chunk: int, mask: torch.Tensor, dtype: torch.dtype) -> None:
    head, other = nn.Linear(8, 31, bias=False).to(dtype), nn.Linear(8, 31, bias=False).to(dtype)
    student, teacher = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True), torch.randn(3, 7, 8, dtype=dtype)
    loss = ChunkedKL(chunk)(student, teacher, head, other, mask)
    reference = nn.Linear(8, 31, bias=False).double()
    reference.weight.data = head.weight.detach().double()
    x = student.detach().double().requires_grad_()
    other64 = nn.Linear(8, 31, bias=False).double()
    other64.weight.data = other.weight.detach().double()
    expected = plain_kl(x, teacher.double(), reference, other64, mask)
    (3 * loss).backward()  # a factor on the way back, as accumulation has
    (3 * expected).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-3}
    for ours, plain in ((loss, expected), (student.grad, x.grad), (head.weight.grad, reference.weight.grad)):
        torch.testing.assert_close(ours.double(), plain, **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_terms_a_few_tokens_at_a_time_are_those_of_the_whole_chunk(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 35, 8).to(dtype)
    heads = torch.randn(2, 50, 8).to(dtype)
    weight = (torch.rand(35, 1) > 0.3).float()
    (ours, gradient), (loss, expected) = (
        f(student, teacher, *heads, weight) for f in (chunk_terms_in_cache, chunk_terms)
    )
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(gradient, expected)


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    embedding, ids = nn.Embedding(31, 8), torch.randint(31, (3, 7))
    head, other, teacher = nn.Linear(8, 31, bias=False), nn.Linear(8, 31, bias=False), torch.randn(3, 7, 8)
    head.weight = embedding.weight
    ours = torch.autograd.grad(ChunkedKL(5)(embedding(ids), teacher, head, other, SOME), embedding.weight)[0]
    logits, target = F.linear(embedding(ids), embedding.weight), other(teacher)
    plain = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
    expected = torch.autograd.grad(plain.sum(-1)[SOME].mean(), embedding.weight)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_no_token_that_counts_is_a_loss_of_zero() -> None:
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    student, teacher = torch.randn(3, 7, 8, requires_grad=True), torch.randn(3, 7, 8)
    head = nn.Linear(8, 31, bias=False)
    losses = (
        cosine_distance(student, teacher, nothing),
        ChunkedKL()(student, teacher, head, head, nothing),
    )
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.equal(gradient, torch.zeros_like(student))


def test_metrics_over_uneven_batches_are_those_of_all_tokens_together() -> None:
    head, other = nn.Linear(8, 31, bias=False), nn.Linear(8, 31, bias=False)
    student, teacher = torch.randn(5, 7, 8), torch.randn(5, 7, 8)
    ids, mask = torch.randint(31, (5, 7)), torch.rand(5, 7) < 0.6
    fidelity, layers = Fidelity(), LayerNMSE(2)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        fidelity.update(student[part], teacher[part], head, other, ids[part], mask[part], chunk=2)
        layers.update(0, student[part], teacher[part])
        layers.update(1, teacher[part] * 2, teacher[part])
    found = fidelity.compute()
    s, t = head(student).double().log_softmax(-1), other(teacher).double().log_softmax(-1)
    assert found["kl"].item() == pytest.approx((t.exp() * (t - s)).sum(-1)[mask].mean().item(), rel=1e-5)
    assert found["top1"].item() == pytest.approx((s.argmax(-1) == t.argmax(-1))[mask].double().mean().item())
    for name, log in (("ppl_student", s), ("ppl_teacher", t)):
        nll = -log[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, :-1]]
        assert found[name].item() == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    per_layer = layers.compute()
    assert per_layer[0].item() == pytest.approx(((student - teacher) ** 2).sum().item() / (teacher**2).sum().item())
    assert per_layer[1].item() == pytest.approx(1.0, rel=1e-5)
