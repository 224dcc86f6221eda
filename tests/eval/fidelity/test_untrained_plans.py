"""Untrained students of many plans, measured in one pass: the same as each student alone with full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.distillation.losses import kl_divergence
from pl_attnedit.eval.fidelity.untrained import UntrainedPlans, cached_by_letter, single_edits
from pl_attnedit.eval.progress import Progress
from pl_attnedit.modeling.kv import fill_cache

TARGETS = {"S": GateSWAConfig(window=3), "M": MLAConfig(8, 4), "D": GatedDeltaNetConfig()}
Make = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_one_pass_measures_what_each_student_alone_does(make_teacher: Make, make_ids: Make, family: str) -> None:
    teacher: PreTrainedModel = make_teacher(family)
    calibration = [make_ids(4, 16, seed) for seed in range(4)]
    batches = [make_ids(2, 16, seed=10), make_ids(1, 16, seed=11)]
    plans = [*single_edits(4, "S"), "FMFF", "SMFD"]
    assert plans[:4] == ["SFFF", "FSFF", "FFSF", "FFFS"]
    rows = UntrainedPlans(teacher, TARGETS, calibration).measure(plans, batches)

    for plan, row in zip(plans, rows, strict=True):
        targets = {letter: TARGETS[letter] for letter in set(plan) - {"F"}}
        student = edit_model(teacher, targets, pattern=plan, calibration=calibration)
        divergences, differences, agreements = [], [], []
        for ids in batches:
            ours, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
            divergences.append(kl_divergence(ours, theirs).flatten())
            nll = [-x.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).flatten() for x in (ours, theirs)]
            differences.append(nll[0] - nll[1])
            agreements.append((ours.argmax(-1) == theirs.argmax(-1)).flatten())
        assert row["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
        assert row["nll_difference"] == pytest.approx(torch.cat(differences).mean().item(), rel=1e-3, abs=1e-6)
        assert row["top1"] == pytest.approx(torch.cat(agreements).float().mean().item())
        spread = torch.stack([kl.mean() for kl in divergences]).std() / 2**0.5
        assert row["kl_error"] == pytest.approx(spread.item(), rel=1e-3)
        assert row["kl"] > 1e-3


@torch.no_grad()
def test_only_what_the_mask_asks_for_counts(make_teacher: Make, make_ids: Make) -> None:
    teacher, ids, mask = make_teacher("llama"), make_ids(2, 16), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 9:12] = mask[1, 14] = True
    [row] = UntrainedPlans(teacher, {"S": TARGETS["S"]}).measure(["SFSF"], [(ids, mask)])
    student = edit_model(teacher, {"S": TARGETS["S"]}, pattern="SFSF")
    ours, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    assert row["kl"] == pytest.approx(kl_divergence(ours, theirs)[mask].mean().item(), rel=1e-4)
    nll = [-x.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, :-1]] for x in (ours, theirs)]
    assert row["nll_difference"] == pytest.approx((nll[0] - nll[1]).mean().item(), rel=1e-3)
    assert row["nll_error"] is None


@torch.no_grad()
def test_one_batch_has_no_error_and_full_layers_change_nothing(
    make_teacher: Make, make_ids: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = UntrainedPlans(make_teacher("llama"), {"S": GateSWAConfig(window=64)})
    [full, wide] = plans.measure(["FFFF", "SFSS"], [make_ids(2, 16)], Progress().begin(2, dict))
    assert capsys.readouterr().err.startswith("batch 1, FFFF (1 of 2)\nbatch 1, SFSS (2 of 2; 0:00:0")
    assert full["kl_error"] is None
    assert full["kl"] == pytest.approx(0, abs=1e-9)
    assert wide["kl"] == pytest.approx(0, abs=1e-6)  # a window longer than the text is the teacher


def test_cached_bytes_are_those_of_real_caches(make_teacher: Make) -> None:
    teacher = make_teacher("qwen3_moe")
    cached = cached_by_letter(teacher, TARGETS, 40)
    for letter, target in TARGETS.items():
        student = edit_model(teacher, target, pattern="S", init="random")
        assert cached[letter] == next(fill_cache(student, 40))
    assert cached["F"] == next(fill_cache(teacher, 40))
