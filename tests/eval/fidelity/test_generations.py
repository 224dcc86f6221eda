"""What both models write: equal models write the same, a damaged one is found worse, nothing is written twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import framed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.fidelity import generations as module
from pl_attnedit.eval.fidelity.by_position import compare_positions
from pl_attnedit.eval.fidelity.generations import (
    METRICS,
    SameDraws,
    by_document,
    generations,
    prompts_of,
    repetition,
    write,
)
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
        found = generations(sharp, student, tokenizer, prompts, range(24), 12, prints=PRINTS, folders=(None, None))
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
    found = generations(sharp, student, tokenizer, prompts[:3], range(3), 6, prints=PRINTS, folders=(None, None))
    [text] = write(student, tokenizer, prompts[1:2], 6, SameDraws([1], 12, 6, 0))  # the same alone as in a batch
    row = found["student"][1]
    assert row["sampled"] == tokenizer.decode(text)
    ids = torch.cat([prompts[1], torch.tensor(text)])[None]
    logs = [model(ids).logits[0, 11:-1].log_softmax(-1) for model in (sharp, student)]
    nll = -logs[0].gather(-1, torch.tensor(text)[:, None]).mean()
    assert row["sampled_nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert row["path_kl"] == pytest.approx((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item(), rel=1e-4)


def test_texts_of_all_lengths_are_scored_together(
    sharp: PreTrainedModel, student: PreTrainedModel, prompts: torch.Tensor
) -> None:
    texts = [[3], [1, 2, 3, 4, 5, 6, 7], [5, 5]]
    written = [dict.fromkeys(module.KINDS, texts)] * 2
    together = module._scores(sharp, student, prompts[:3], written)["scores"][1]["greedy"]
    for row, text in enumerate(texts):
        [alone] = compare_positions(sharp, student, torch.tensor([[*prompts[row].tolist(), *text]]))
        assert together[row] == pytest.approx([alone[at, 11:-1].mean().item() for at in (2, 0)], rel=1e-4)


def test_draws_are_of_the_models_distribution() -> None:
    logits, places = torch.tensor([1.0, 0.0, -torch.inf, -1.0]), 4000
    scores = SameDraws(range(places), 1, 1, 0)(torch.zeros(places, 1), logits.expand(places, -1))
    shares = torch.bincount(scores.argmax(-1), minlength=4) / places
    assert shares[2] == 0
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
    monkeypatch.setattr(module, "BATCH", {"cpu": 4})

    def run(fail_at: int) -> Any:
        def counted(*args: Any) -> Any:
            asked.append(len(args[2]))
            if len(asked) == fail_at:
                raise KeyboardInterrupt
            return write(*args)

        monkeypatch.setattr(module, "write", counted)
        folders = (tmp_path / "teachers", tmp_path / "own")
        return generations(sharp, student, tokenizer, prompts[:10], range(10), 4, prints=PRINTS, folders=folders)

    with pytest.raises(KeyboardInterrupt):
        run(fail_at=7)
    assert run(fail_at=0) == run(fail_at=0) == generations(
        sharp, student, tokenizer, prompts[:10], range(10), 4, prints=PRINTS, folders=(None, None)
    )  # fmt: skip
    assert asked[:13] == [4] * 9 + [2] * 4, "two of seven were begun and are asked again"
    assert len(asked) == 13 + 12


def test_prompts_are_beginnings_and_then_what_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    begun = framed(tokenizer, "bos")
    documents = ["a of is it we " * n for n in (1, 30, 6, 12)]  # the first is too short
    rows = [begun(document)["input_ids"] for document in documents]
    ids, of = prompts_of(documents, begun, 2, 10)
    assert ids.tolist() == [rows[i][:10] for i in (1, 2)]
    assert of == [1, 2]
    ids, of = prompts_of(documents, begun, 6, 10)
    assert of[:3] == [1, 2, 3]
    for row, document in zip(ids[3:].tolist(), of[3:], strict=True):
        assert row[0] == begun.bos_token_id
        assert row[1:] in (rows[document][11:20], rows[document][21:30])
    assert prompts_of(documents, begun, 1000, 10)[1].count(1) == (len(rows[1]) - 1) // 10
    with pytest.raises(UserError, match=r"generation\.prompt_tokens = 100000: only 0 documents are longer"):
        prompts_of(documents, begun, 3, 100_000)


def test_prompts_are_halved_where_memory_does_not_suffice(
    sharp: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> Any:
        return generations(sharp, student, tokenizer, prompts[:7], range(7), 6, prints=PRINTS, folders=(None, None))

    def hungry(_: Any, prompts_BT: torch.Tensor, *__: Any) -> Any:
        if len(prompts_BT) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    expected, most = run(), 2
    monkeypatch.setattr(module, "write", lambda *asked: hungry(*asked[1:]) or write(*asked))
    found = run()
    for name, samples in expected.items():
        for one, same in zip(found[name], samples, strict=True):
            assert (one["sampled"], one["greedy"]) == (same["sampled"], same["greedy"])
            assert one["doc_hash"] == same["doc_hash"]  # kept and paired as if there had been memory
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        run()


def test_prompts_of_one_document_are_one_sample(
    sharp: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: torch.Tensor
) -> None:
    found = generations(sharp, student, tokenizer, prompts[:4], [7, 7, 9, 7], 6, prints=PRINTS, folders=(None, None))
    for samples in found.values():
        seven, nine = by_document(samples)
        for metric in METRICS:
            assert seven[metric] == pytest.approx(sum(samples[i][metric] for i in (0, 1, 3)) / 3)
            assert nine[metric] == samples[2][metric]


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(9))) == 0
    assert repetition([1] * 10) == pytest.approx(6 / 7)
