"""What both models write: equal models write the same, a damaged one is found worse, nothing is written twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity import generations as module
from pl_attnedit.eval.fidelity.generations import METRICS, GumbelNoise, generations, prompts_of, repetition, write
from pl_attnedit.eval.harness.differences import TaskDifference, compare_samples

PRINTS = ("t", "s")
Compare = Callable[[PreTrainedModel], dict[str, TaskDifference]]


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return torch.randint(1, len(tokenizer), (24, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sharp(teacher: PreTrainedModel) -> PreTrainedModel:
    """A teacher that is sure of something: a random one finds all texts alike."""
    sharp = copy.deepcopy(teacher)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(4)
    return sharp


@pytest.fixture
def compare(sharp: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: torch.Tensor) -> Compare:
    def run(student: PreTrainedModel) -> dict[str, TaskDifference]:
        found = generations(sharp, student, tokenizer, prompts, 12, prints=PRINTS, folders=(None, None))
        pairs = {"generation": list(zip(found["teacher"], found["student"], strict=True))}
        return {row.metric: row for row in compare_samples(pairs, {"generation": METRICS})}

    return run


def test_a_model_beside_itself_writes_the_same(compare: Compare, sharp: PreTrainedModel) -> None:
    rows = compare(copy.deepcopy(sharp))
    assert list(rows) == list(METRICS)
    for row in rows.values():
        assert (row.difference, row.ci_low, row.ci_high, row.p_value, row.n) == (0, 0, 0, 1, 24)
    assert rows["path_kl"].student == pytest.approx(0, abs=1e-6)
    assert rows["greedy_agreement"].student == rows["greedy_length"].student


def test_a_damaged_model_is_found_worse(compare: Compare, sharp: PreTrainedModel) -> None:
    damaged = copy.deepcopy(sharp)
    with torch.no_grad():
        damaged.model.layers[1].self_attn.o_proj.weight.mul_(-1)
    rows = compare(damaged)
    for metric in ("sampled_nll", "greedy_nll"):
        assert rows[metric].ci_low > 0, metric
    assert rows["greedy_agreement"].ci_high < 0
    assert rows["path_kl"].teacher > 0.01  # of the damaged model, along the teacher's path


def test_scores_are_the_teachers_of_what_is_written(
    sharp: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: torch.Tensor
) -> None:
    found = generations(sharp, student, tokenizer, prompts[:3], 6, prints=PRINTS, folders=(None, None))
    noise = GumbelNoise([1], 12, 0)
    [text] = write(student, tokenizer, prompts[1:2], 6, noise)  # the same alone as in a batch
    row = found["student"][1]
    assert row["sampled"] == tokenizer.decode(text)
    ids = torch.cat([prompts[1], torch.tensor(text)])[None]
    logs = [model(ids).logits[0, 11:-1].log_softmax(-1) for model in (sharp, student)]
    nll = -logs[0].gather(-1, torch.tensor(text)[:, None]).mean()
    assert row["sampled_nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert row["path_kl"] == pytest.approx((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item(), rel=1e-4)


def test_noise_samples_from_the_models_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    drawn = [GumbelNoise([place], 1, 0)(torch.zeros(1, 1), logits[None]).argmax().item() for place in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.03)


def test_an_interrupted_evaluation_writes_only_what_is_missing(
    sharp: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "BATCH", 4)

    def run(fail_at: int) -> Any:
        def counted(*args: Any) -> Any:
            asked.append(len(args[2]))
            if len(asked) == fail_at:
                raise KeyboardInterrupt
            return write(*args)

        monkeypatch.setattr(module, "write", counted)
        folders = (tmp_path / "teachers", tmp_path / "own")
        return generations(sharp, student, tokenizer, prompts[:10], 4, prints=PRINTS, folders=folders)

    with pytest.raises(KeyboardInterrupt):
        run(fail_at=7)
    assert run(fail_at=0) == run(fail_at=0) == generations(
        sharp, student, tokenizer, prompts[:10], 4, prints=PRINTS, folders=(None, None)
    )  # fmt: skip
    assert asked[:13] == [4] * 9 + [2] * 4, "two of seven were begun and are asked again"
    assert len(asked) == 13 + 12


def test_prompts_are_beginnings(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    found = prompts_of(documents, tokenizer, 3, 10)
    assert found.tolist() == [tokenizer(documents[i])["input_ids"][:10] for i in (0, 2, 4)]
    with pytest.raises(UserError, match=r"generation\.prompt_tokens = 100000: only 0 documents are longer"):
        prompts_of(documents, tokenizer, 3, 100_000)


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(9))) == 0
    assert repetition([1] * 10) == pytest.approx(6 / 7)
