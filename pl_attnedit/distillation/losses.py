"""The losses of both stages. Reductions are in float32; masked tokens count neither above nor below the line."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-8


def squared_error_and_energy(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens and features of (prediction - target)^2 and of target^2.

    prediction and target (batch, time, hidden); mask (batch, time), True = counts.
    """
    error = (prediction.float() - target.float()).square().sum(-1)
    energy = target.float().square().sum(-1)
    if mask is not None:
        error, energy = error * mask, energy * mask
    return error.sum(), energy.sum()


def nmse(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error normalised by the target's energy, ||prediction - target||^2 / (||target||^2 + eps), over the batch."""
    error, energy = squared_error_and_energy(prediction, target, mask)
    return error / (energy + EPS)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of 1 - cosine between hidden states (batch, time, hidden)."""
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    if mask is None:
        return distance.mean()
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Forward KL(teacher || student) of next-token distributions in nats; logits (..., vocabulary) to (...)."""
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


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
        chunk: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(student) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=torch.float32) if need_head else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            student_log = (student[rows] @ student_head.T).float().log_softmax(-1)
            teacher_log = (teacher[rows] @ teacher_head.T).float().log_softmax(-1)
            teacher_probability = teacher_log.exp()
            total += (teacher_probability * (teacher_log - student_log)).sum()
            if need_hidden or need_head:
                difference = (student_log.exp_() - teacher_probability).to(student.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = difference @ student_head
                if grad_head is not None:
                    grad_head += difference.T @ student[rows]
        ctx.save_for_backward(*(grad for grad in (grad_hidden, grad_head) if grad is not None))
        ctx.has = (need_hidden, need_head, student_head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_hidden, need_head, head_dtype = ctx.has
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) * grad_output if need_hidden else None
        grad_head = (saved.pop(0) * grad_output).to(head_dtype) if need_head else None
        return grad_hidden, None, grad_head, None, None


def chunked_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    mask: torch.Tensor,
    chunk: int = 1024,
) -> torch.Tensor:
    """Mean forward KL(teacher || student) in nats over the masked-in tokens, from last hidden states.

    student and teacher (batch, time, hidden) after the final norm; heads without bias; mask (batch, time), True = counts;
    chunk: tokens whose logits exist at a time. Equals the mean of `kl_divergence` on full logits.
    """
    rows = mask.flatten().nonzero().flatten()
    student, teacher = student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows]
    total = _ChunkedKL.apply(student, teacher, student_head.weight, teacher_head.weight, chunk)
    return total / max(len(rows), 1)
