"""The losses of both stages. Reductions are in float32; masked tokens count neither above nor below the line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pl_attnedit.attention.kernels.autocast import to_autocast
from pl_attnedit.distillation.engine.local_gradients import compile_whole

EPS = 1e-8


def squared_error_and_energy(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens and features of (prediction - reference)^2 and of reference^2, (batch, time, hidden) each."""
    error = (prediction.float() - reference.float()).square().sum(-1)
    return error.sum(), reference.float().square().sum(-1).sum()


def nmse(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared error normalised by the energy of what was to be reproduced, over the batch:
    ||prediction - reference||^2 / (||reference||^2 + eps)."""
    error, energy = squared_error_and_energy(prediction, reference)
    return error / (energy + EPS)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of 1 - cosine between hidden states (batch, time, hidden); mask (batch, time), True = counts."""
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Forward KL(teacher || student) of next-token distributions in nats; logits (..., vocabulary) to (...)."""
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def sampling_excess(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much less likely to the teacher a token is that the student samples than one that the teacher samples: the mean
    difference in nats, (...), and how fast it falls as the student's logits grow by a factor; logits (..., vocabulary)."""
    teacher, logits = teacher_logits.float().log_softmax(-1), student_logits.float()
    student = logits.softmax(-1)
    likelihood = (student * teacher).sum(-1)
    excess = (teacher.exp() * teacher).sum(-1) - likelihood
    return excess, (student * logits * teacher).sum(-1) - (student * logits).sum(-1) * likelihood


def chunk_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: torch.Tensor,
    teacher_head: torch.Tensor,
    weight: Any,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the KL over some tokens, and its gradient for the student's products with its head, (tokens, vocabulary).

    student and teacher (tokens, hidden); heads (vocabulary, hidden); weight (tokens, 1) float32, 0 for what does not count;
    finish makes logits of the products, if they are none yet.
    """
    student_logits, teacher_logits = student @ student_head.T, teacher @ teacher_head.T
    if finish is not None:
        student_logits, gradient_of = torch.func.vjp(finish, student_logits)  # type: ignore[misc]
        teacher_logits = finish(teacher_logits)
    kl, gradient = kl_and_gradient(student_logits, teacher_logits)
    gradient = gradient.mul_(weight).to(student_logits.dtype)
    return (kl * weight).sum(), gradient if finish is None else gradient_of(gradient)[0].to(student.dtype)


def kl_and_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student), (tokens, 1), and its gradient for the student's logits, (tokens, vocabulary); logits likewise,
    results float32."""
    student_log = student_logits.float().log_softmax(-1)
    teacher_log = teacher_logits.float().log_softmax(-1)
    teacher_probability = teacher_log.exp()
    kl = teacher_log.sub_(student_log).mul_(teacher_probability).sum(-1, keepdim=True)
    return kl, student_log.exp_().sub_(teacher_probability)


def chunk_terms_in_cache(
    student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor, weight: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_terms`, a few tokens at a time after the matrix products: what a CPU has just written is in its cache still."""
    student_logits, teacher_logits = student @ student_head.T, teacher @ teacher_head.T
    loss, few = torch.zeros((), device=student.device), 16
    for logits, theirs, part in zip(student_logits.split(few), teacher_logits.split(few), weight.split(few)):
        kl, gradient = kl_and_gradient(logits, theirs)
        loss += (kl * part).sum()
        logits.copy_(gradient.mul_(part))
    return loss, student_logits


def tokens_of_a_chunk(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits stay small beside everything else, and still fill the matrix product: 256 MB of float32 on an
    accelerator, 64 MB on a CPU."""
    return max(1, (2**26 if device.type == "cpu" else 2**28) // (4 * vocabulary))


class _ChunkedKL(torch.autograd.Function):
    """KL over the vocabulary a chunk of tokens at a time, the gradient taken in the forward pass.

    Never holds more than one chunk of logits: what a chunk's softmax differs by from the teacher's is, times the head,
    already its gradient for the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_head: torch.Tensor,
        teacher_head: torch.Tensor,
        weight: torch.Tensor,
        chunk: int,
        terms: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(student) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=torch.float32) if need_head else None
        head, teacher_head = student_head.to(student.dtype), teacher_head.to(teacher.dtype)
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            loss, grad_logits = terms(student[rows], teacher[rows], head, teacher_head, weight[rows])
            total += loss
            if grad_hidden is not None:
                torch.mm(grad_logits, head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head += grad_logits.T @ student[rows]
            del grad_logits
        ctx.gradients, ctx.head_dtype = (grad_hidden, grad_head), student_head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(upstream)
        if grad_head is not None:
            grad_head = grad_head.mul_(upstream).to(ctx.head_dtype)
        return grad_hidden, None, grad_head, None, None, None, None


class ChunkedKL:
    """Mean forward KL(teacher || student) in nats over the tokens that count, from last hidden states.

    Equals the mean of `kl_divergence` on full logits.

    Args:
        chunk: tokens whose logits exist at a time; default `tokens_of_a_chunk`.
        compiled: whether the passes over a chunk's logits are fused by torch.compile.
    """

    def __init__(self, chunk: int | None = None, *, compiled: bool = False) -> None:
        self.chunk = chunk
        self.terms = compile_whole(chunk_terms) if compiled else None

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_head: nn.Linear,
        teacher_head: nn.Linear,
        mask: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """student and teacher (batch, time, hidden) after the final norm; heads without bias, whose `finish`, if they have
        one, makes logits of the products; mask (batch, time), True = counts; rows: where the flattened mask is True, if
        that is known already."""
        if rows is None:
            rows = mask.flatten().nonzero().flatten()
        counted = len(rows)
        most = mask.numel() if self.terms else counted  # compiled for one size, however many tokens of a batch count
        chunk = min(self.chunk or tokens_of_a_chunk(len(teacher_head.weight), student.device), max(most, 1))
        weight = torch.ones(counted, 1, device=student.device)
        if counted % chunk:  # whole chunks only: another shape would be compiled once more
            missing = chunk - counted % chunk
            rows, weight = F.pad(rows, (0, missing)), F.pad(weight, (0, 0, 0, missing))
        student, teacher = to_autocast(student.flatten(0, 1), teacher.flatten(0, 1))
        if not counted == len(student) == len(rows):
            student, teacher = student[rows], teacher[rows]
        terms = self.terms or (chunk_terms_in_cache if student.device.type == "cpu" else chunk_terms)
        if finish := getattr(student_head, "finish", None):
            terms = partial(self.terms or chunk_terms, finish=finish)
        total = _ChunkedKL.apply(student, teacher, student_head.weight, teacher_head.weight, weight, chunk, terms)
        return total / max(counted, 1)
