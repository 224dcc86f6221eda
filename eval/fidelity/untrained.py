"""How far students of many edit plans are from their teacher before any training, layer by layer or as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pl_attnedit.attention import TargetConfig
from pl_attnedit.distillation.engine.decoder import Call
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.distillation.engine.pairs import Pairs
from pl_attnedit.distillation.losses import tokens_of_a_chunk
from pl_attnedit.distillation.metrics import Fidelity
from pl_attnedit.eval.progress import Progress
from pl_attnedit.modeling import FULL, edit_model
from pl_attnedit.modeling.edit import build_plan
from pl_attnedit.modeling.hf import edited_config
from pl_attnedit.modeling.kv import held_bytes, on_meta


class UntrainedPlans:
    """Every target in every layer, calibrated (or copied) and untrained, beside the teacher; the trunk is shared.

    A plan's students differ from the teacher only from the first edited layer on, so only those layers are run again, on the
    teacher's hidden states. Logits exist a chunk of tokens at a time.

    Args:
        targets: by pattern letter.
        calibration: batches of input ids (batch, time), for targets whose init looks at text.
    """

    def __init__(
        self, teacher: PreTrainedModel, targets: Mapping[str, TargetConfig], calibration: Sequence[Tensor] | None = None
    ) -> None:
        self.teacher, self.targets = teacher, targets
        self.pairs = {}
        for letter, target in targets.items():
            student = edit_model(teacher, target, pattern="S", calibration=calibration)
            check_forward(teacher, student)
            self.pairs[letter] = Pairs(teacher, student)
        self._any = next(iter(self.pairs.values()))

    @torch.no_grad()
    def measure(
        self,
        plans: Sequence[str],
        batches: Iterable[Tensor | tuple[Tensor, Tensor]],
        progress: Progress | None = None,
    ) -> list[dict[str, float | None]]:
        """One row for each plan, a letter for each layer.

        Keys: `kl`, forward KL(teacher||student) in nats per token; `nll_difference`, student less teacher in nats per token;
        `kl_error` and `nll_error`, their standard errors over batches (None where there is one batch); `top1`, agreement.

        Args:
            batches: input ids (batch, time) int64; with a mask (batch, time), only the predictions made at its places count.
            progress: told of each plan on each batch.
        """
        weights: list[int] = []
        found: list[list[dict[str, float]]] = [[] for _ in plans]
        for number, batch in enumerate(batches, start=1):
            ids, mask = batch if isinstance(batch, tuple) else (batch, torch.ones_like(batch, dtype=torch.bool))
            ids, mask = ids.to(self.teacher.device), mask.to(self.teacher.device)
            weights.append(int(mask.sum()))
            states, calls = self._teacher_states(ids)
            for plan, rows in zip(plans, found):
                if progress is not None:
                    progress.next(f"batch {number}, {plan}")
                rows.append(self._compare(plan, ids, mask, states, calls))
        return [_mean(rows, weights) for rows in found]

    def _teacher_states(self, ids: Tensor) -> tuple[list[Tensor], list[Call]]:
        """What enters each layer of the teacher, and what leaves the last: (batch, time, hidden)."""
        hidden, _, calls = self._any.begin({"input_ids": ids})
        states = [hidden]
        for pair, call in self._any.with_calls(calls):
            states.append(pair.run_teacher(states[-1], call).output)
        return states, calls

    def _compare(
        self, plan: str, ids: Tensor, mask: Tensor, states: list[Tensor], calls: list[Call]
    ) -> dict[str, float]:
        first = len(plan) - len(plan.lstrip(FULL))
        hidden = states[first]
        for letter, index in zip(plan[first:], range(first, len(plan))):
            pair: Any = (self._any if letter == FULL else self.pairs[letter]).layers[index]
            call = calls[index]
            hidden = pair.run_teacher(hidden, call).output if letter == FULL else pair.run_student(hidden, call)
        fidelity = Fidelity().to(ids.device)
        chunk = tokens_of_a_chunk(self.teacher.config.vocab_size, ids.device)
        self._any.heads(states[-1], hidden, partial(fidelity.update, input_ids=ids, mask=mask, chunk=chunk))
        values = fidelity.compute()
        difference = values["ppl_student"].log() - values["ppl_teacher"].log()
        return {"kl": values["kl"].item(), "nll_difference": difference.item(), "top1": values["top1"].item()}


def single_edits(layers: int, letter: str) -> list[str]:
    """The plans that edit one layer, in order."""
    return [FULL * index + letter + FULL * (layers - index - 1) for index in range(layers)]


def cached_by_letter(
    teacher: PreTrainedModel, targets: Mapping[str, TargetConfig], context: int
) -> dict[str, list[int]]:
    """Bytes that each layer caches for one sequence of `context` tokens as a full layer and with each target, where a
    pattern would edit it."""
    config = teacher.config
    plans = {letter: build_plan(config, {letter: target}, letter) for letter, target in targets.items()}
    configs: dict[str, Any] = {letter: edited_config(config, plan) for letter, plan in plans.items()}
    models = {letter: on_meta(c, teacher.dtype) for letter, c in {**configs, FULL: config}.items()}
    return {letter: held_bytes(model, context) for letter, model in models.items()}


def _mean(rows: list[dict[str, float]], weights: list[int]) -> dict[str, float | None]:
    mean: dict[str, float | None] = {
        name: sum(row[name] * weight for row, weight in zip(rows, weights)) / sum(weights) for name in rows[0]
    }
    for name, of in (("kl_error", "kl"), ("nll_error", "nll_difference")):
        mean[name] = statistics.stdev(row[of] for row in rows) / len(rows) ** 0.5 if len(rows) > 1 else None
    return mean
