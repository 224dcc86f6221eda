"""Greedy continuations and the point where they part."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity.continuations import DEFAULT_PROMPTS, greedy_continuations


def by_hand(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_where_they_part(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = greedy_continuations(teacher, student, tokenizer, max_new_tokens=8)
    assert [row["prompt"] for row in rows] == list(DEFAULT_PROMPTS)
    assert any(row["parts_at"] is not None for row in rows), "the student is damaged"
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        tokens = [by_hand(model, ids, 8) for model in (teacher, student)]
        assert [row["teacher"], row["student"]] == [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
        differ = [i for i, (a, b) in enumerate(zip(*tokens)) if a != b]
        assert row["parts_at"] == (differ[0] if differ else None)
        assert row["teacher"].startswith(row["common"])
        assert row["student"].startswith(row["common"])


def test_a_model_agrees_with_itself(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = greedy_continuations(teacher, teacher, tokenizer, ["What is"], max_new_tokens=5)
    assert row["parts_at"] is None
    assert row["teacher"] == row["student"] == row["common"]


def test_no_tokens(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        greedy_continuations(teacher, teacher, tokenizer, max_new_tokens=0)
