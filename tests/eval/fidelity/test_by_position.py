"""KL and agreement by position in context."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import GateSWAConfig, edit_model
from pl_attnedit.distillation.losses import kl_divergence
from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity.by_position import by_position, compare_positions, fidelity, packed_sequences


@pytest.fixture(scope="module")
def tokens(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return packed_sequences(documents, tokenizer, 3, 100)


def test_sequences_are_spread_over_the_text(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [id for text in documents for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    everything = packed_sequences(documents, tokenizer, 10**6, 100)
    assert everything.flatten().tolist() == ids[: len(ids) // 100 * 100]
    few = packed_sequences(documents, tokenizer, 3, 100)
    third = len(everything) / 3
    assert torch.equal(few, everything[[0, round(third), round(2 * third)]])


def test_too_little_text(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        packed_sequences(documents[:1], tokenizer, 50, 100)
    assert "of 50 sequences" in caplog.text
    with pytest.raises(UserError, match=r"by_position.context = 100000: the held-out text has only \d+ tokens"):
        packed_sequences(documents, tokenizer, 1, 100_000)


def test_bins_add_up_to_the_whole(teacher: PreTrainedModel, student: PreTrainedModel, tokens: torch.Tensor) -> None:
    rows = by_position(compare_positions(teacher, student, tokens))
    assert [(row["start"], row["end"], row["n"]) for row in rows] == [(0, 64, 192), (64, 100, 108)]
    with torch.no_grad():
        logits = [model(tokens).logits for model in (teacher, student)]
    kl = kl_divergence(logits[1], logits[0])
    assert rows[0]["kl"] == pytest.approx(kl[:, :64].mean().item(), rel=1e-4)
    assert rows[1]["kl"] == pytest.approx(kl[:, 64:].mean().item(), rel=1e-4)
    agree = (logits[0].argmax(-1) == logits[1].argmax(-1)).float()
    assert rows[1]["top1"] == pytest.approx(agree[:, 64:].mean().item())
    for row, part in zip(rows, (slice(0, 64), slice(64, 99))):
        for name, each in zip(("nll_teacher", "nll_student"), logits):
            expected = torch.nn.functional.cross_entropy(each[:, part].flatten(0, 1), tokens[:, 1:][:, part].flatten())
            assert row[name] == pytest.approx(expected.item(), rel=1e-4)


def test_a_window_parts_where_it_is_full(teacher: PreTrainedModel, tokens: torch.Tensor) -> None:
    student = edit_model(teacher, GateSWAConfig(window=64, gate="none"), init="copy").eval()
    near, far = by_position(compare_positions(teacher, student, tokens))
    assert near["kl"] < 1e-6 < far["kl"]
    assert near["top1"] == 1


def test_the_teacher_runs_once(
    teacher: PreTrainedModel, student: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    first = compare_positions(teacher, student, tokens, teacher_kept_in=tmp_path / "hidden")
    runs = []
    handle = teacher.base_model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        assert torch.equal(compare_positions(teacher, student, tokens, teacher_kept_in=tmp_path / "hidden"), first)
        assert not runs
        compare_positions(teacher, student, tokens[:2], teacher_kept_in=tmp_path / "hidden")
        assert len(runs) == 2
    finally:
        handle.remove()
    same = compare_positions(teacher, teacher, tokens, teacher_kept_in=tmp_path / "hidden")
    assert all((row["kl"], row["top1"]) == (0, 1) for row in by_position(same))


def test_fidelity_is_over_all_positions_with_errors_over_sequences(
    teacher: PreTrainedModel, student: PreTrainedModel, tokens: torch.Tensor
) -> None:
    values = compare_positions(teacher, student, tokens)
    found = fidelity(values)
    rows = by_position(values)
    for name in ("kl", "top1"):
        assert found[name] == pytest.approx(sum(row[name] * row["n"] for row in rows) / 300)
    alone = [fidelity(values[[i]]) for i in range(3)]  # each sequence by itself
    assert found["kl_stderr"] == pytest.approx(torch.tensor([each["kl"] for each in alone]).std().item() / 3**0.5)
    assert found["top1_stderr"] == pytest.approx(torch.tensor([each["top1"] for each in alone]).std().item() / 3**0.5)
    assert (found["sequences"], found["tokens"]) == (3, 300)
    assert (alone[0]["kl_stderr"], alone[0]["top1_stderr"]) == (None, None)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(student(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found["ppl_student"] == pytest.approx(nll.exp().item(), rel=1e-4)
