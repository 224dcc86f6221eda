"""What validation reports: torchmetrics, so that sums are right over batches of any size and over processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torchmetrics import Metric

from pl_attnedit.distillation.losses import EPS, squared_error_and_energy


class LayerNMSE(Metric):
    """Teacher-forced error of each edited layer's attention output, normalised by the teacher's energy: (layers,)."""

    error: torch.Tensor
    energy: torch.Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        for name in ("error", "energy"):  # on the CPU: not every device makes float64
            self.add_state(name, torch.zeros(layers, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, layer: int, prediction: torch.Tensor, reference: torch.Tensor) -> None:
        """layer: place among the edited layers; prediction and reference (batch, time, hidden)."""
        error, energy = squared_error_and_energy(prediction, reference)
        self.error[layer] += error
        self.energy[layer] += energy

    def compute(self) -> torch.Tensor:
        return self.error / (self.energy + EPS)


def log_probabilities(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module, chunk: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """A chunk of tokens at a time: which ones, and the log-probabilities of what follows them, by the student and by the
    teacher, (tokens, vocabulary) float32, on the student's device. student, teacher: last hidden states (tokens, hidden)."""
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        student_log = student_head(student[rows]).float().log_softmax(-1)
        yield rows, student_log, teacher_head(teacher[rows]).float().log_softmax(-1).to(student.device)


class Fidelity(Metric):
    """How close the student's next-token distributions are to the teacher's, on the tokens that count.

    `compute` gives kl (nats per token), top1 (share of tokens with the same most likely next token), ppl_teacher and
    ppl_student (perplexity of the text).
    """

    kl: torch.Tensor
    agree: torch.Tensor
    tokens: torch.Tensor
    nll_teacher: torch.Tensor
    nll_student: torch.Tensor
    labels: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("kl", "agree", "tokens", "nll_teacher", "nll_student", "labels"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_head: nn.Linear,
        teacher_head: nn.Linear,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        chunk: int = 512,
    ) -> None:
        """student and teacher: last hidden states (batch, time, hidden); input_ids and mask (batch, time)."""
        labels = torch.full_like(input_ids, -100)
        labels[:, :-1] = input_ids[:, 1:]
        rows = mask.flatten().nonzero().flatten()
        student, teacher, labels = student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows], labels.flatten()[rows]
        for part, student_log, teacher_log in log_probabilities(student, teacher, student_head, teacher_head, chunk):
            label = labels[part]
            self.agree += (student_log.argmax(-1) == teacher_log.argmax(-1)).sum()
            self.nll_student += nn.functional.nll_loss(student_log, label, reduction="sum")
            self.nll_teacher += nn.functional.nll_loss(teacher_log, label, reduction="sum")
            self.kl += nn.functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
            self.tokens += len(label)
            self.labels += (label != -100).sum()

    def compute(self) -> dict[str, torch.Tensor]:
        return {
            "kl": self.kl / self.tokens,
            "top1": self.agree / self.tokens,
            "ppl_teacher": (self.nll_teacher / self.labels).exp(),
            "ppl_student": (self.nll_student / self.labels).exp(),
        }
