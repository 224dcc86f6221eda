"""Several sources: what each contributes to an epoch, and what is kept when one of them changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from pl_attnedit.conversion.recipe import recipe_parser
from pl_attnedit.data import Source, TextDataModule, tokens
from pl_attnedit.data.packing import ResumableSampler, epoch_order
from pl_attnedit.errors import UserError


@pytest.fixture
def large(write_jsonl: Callable[..., str], make_text: Callable[[int, int], str]) -> str:
    return write_jsonl([{"text": make_text(seed, 60)} for seed in range(80)], "large.jsonl")


@pytest.fixture
def small(write_jsonl: Callable[..., str], make_text: Callable[[int, int], str]) -> str:
    return write_jsonl([{"text": make_text(seed, 30).upper()} for seed in range(6)], "small.jsonl")


def weighted(tokenizer: Any, names: Sequence[str], weights: Sequence[float | None], **options: Any) -> TextDataModule:
    source: list[str | Source] = [Source(name, weight=weight) for name, weight in zip(names, weights)]
    return TextDataModule(tokenizer, source, **{"seq_len": 32, "batch_size": 4, "val_sequences": 8, **options})


def indices(data: TextDataModule, epoch: int = 0) -> list[int]:
    """The training order of an epoch, up to its last full batch."""
    sampler = ResumableSampler(data.train_sequences, data.batch_size, data.seed, lambda: epoch * len(sampler) // 4)
    return list(sampler)


def source_of(data: TextDataModule, index: int) -> str:
    """The source of a sequence, known by its letters: `small` is in capitals."""
    [ids] = data.train_sequences.__getitems__([index])["input_ids"]
    text = data.tokenizer.decode(ids.tolist()).replace("<eos>", "")
    capitals = sum(map(str.isupper, text)) / sum(map(str.isalpha, text))
    assert capitals < 0.1 or capitals == 1, "a sequence has text of one source"
    return "small" if capitals == 1 else "large"


@pytest.mark.parametrize("weights", [(3, 1), (0.5, 0.5)])
def test_every_epoch_has_the_proportions(tokenizer: Any, large: str, small: str, weights: tuple[float, float]) -> None:
    data = weighted(tokenizer, [large, small], weights)
    total = len(data.train_sequences)
    expected = weights[1] / sum(weights)
    natural = data.train_sequences.sizes[1] / total
    assert natural < 0.22
    for epoch in range(3):
        drawn = indices(data, epoch)
        found = Counter(source_of(data, index) for index in drawn)["small"] / len(drawn)
        assert found == pytest.approx(expected, abs=4 / total)  # an epoch ends with its last full batch


def test_no_sequence_gets_ahead_of_the_others_of_its_source() -> None:
    sizes, counts = np.array([10, 4]), np.array([3, 11])
    numbers = [epoch_order(sizes, counts, 5, epoch) for epoch in range(10)]
    assert len(set(np.concatenate(numbers).tolist())) == 140  # what comes again is cut anew
    orders = [order % 14 for order in numbers]
    assert all(((order < 10).sum(), (order >= 10).sum()) == (3, 11) for order in orders)
    subsampled = np.concatenate([order[order < 10] for order in orders])
    assert Counter(subsampled.tolist()) == dict.fromkeys(range(10), 3)
    assert len(set(subsampled[:9])) == 9
    repeated = Counter()  # type: ignore[var-annotated]
    for order in orders:
        repeated.update(order[order >= 10].tolist())
        assert max(repeated.values()) - min(repeated[i] for i in range(10, 14)) <= 1


def test_order_is_a_function_of_seed_and_epoch(tokenizer: Any, large: str, small: str) -> None:
    def order(epoch: int, **options: Any) -> list[int]:
        return indices(weighted(tokenizer, [large, small], (1, 1), **options), epoch)

    assert order(0) == order(0)
    assert order(1) == order(1) != order(0)
    assert order(0, seed=1) != order(0)
    counts = weighted(tokenizer, [large, small], (1, 1)).train_sequences.per_epoch()
    sizes = weighted(tokenizer, [large, small], (1, 1)).train_sequences.sizes
    assert sorted(epoch_order(sizes, counts, 0, 0)) != sorted(epoch_order(sizes, counts, 0, 1))  # another part


def test_weights_leave_the_held_out_text_alone(tokenizer: Any, large: str, small: str) -> None:
    plain = weighted(tokenizer, [large, small], (None, None))
    one, same, other = (weighted(tokenizer, [large, small], weights) for weights in ((3, 1), (6, 2), (1, 1)))
    assert plain.held_out_texts() == one.held_out_texts() == other.held_out_texts()
    assert one.fingerprint == same.fingerprint
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert indices(one) == indices(same)


def test_without_weights_the_sources_are_one_text(tokenizer: Any, large: str, small: str, tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text(Path(large).read_text() + Path(small).read_text())
    parts = weighted(tokenizer, [large, small], (None, None))
    whole = weighted(tokenizer, [str(both)], (None,))
    assert parts.fingerprint == whole.fingerprint
    assert [row["input_ids"].tolist() for row in parts.train_sequences] == [
        row["input_ids"].tolist() for row in whole.train_sequences
    ]
    twice = weighted(tokenizer, [str(both), small], (None, None))  # what both sources have counts once
    assert twice.fingerprint == whole.fingerprint


def test_calibration_follows_the_weights(tokenizer: Any, large: str, small: str) -> None:
    data = weighted(tokenizer, [large, small], (1, 1))
    texts = [
        tokenizer.decode(row.tolist()) for batch in data.calibration_batches(32 * 20) for row in batch["input_ids"]
    ]
    assert sum(1 for text in texts if sum(map(str.isupper, text)) > 20) == 10


def test_each_source_is_tokenised_once(
    tokenizer: Any, large: str, small: str, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = tokens._write

    def counted(folder: Path, source: Any, *args: Any) -> None:
        written.append(source.name)
        write(folder, source, *args)

    monkeypatch.setattr(tokens, "_write", counted)
    weighted(tokenizer, [large, small], (None, None)).setup()
    assert written == [large, small]
    weighted(tokenizer, [small, large], (2, 1)).setup()
    weighted(tokenizer, [large], (None,), seq_len=16, val_source=small).setup()
    assert written == [large, small]
    weighted(tokenizer, [corpus, large], (2, 1)).setup()
    assert written == [large, small, corpus]


def test_weights_that_cannot_be_met(tokenizer: Any, large: str, small: str, write_jsonl: Callable[..., str]) -> None:
    tiny = write_jsonl([{"text": "Short."}], "tiny.jsonl")
    with pytest.raises(UserError, match=r"weight = 1: .*tiny.jsonl has no sequence of 32 tokens"):
        weighted(tokenizer, [large, tiny], (1, 1), val_source=small).setup()
    with pytest.raises(UserError, match=r"weight = 1e-06: too small for one of the epoch's \d+ sequences to be of"):
        weighted(tokenizer, [large, small], (1, 1e-6)).setup()


def test_weights_from_yaml(large: str, small: str, tmp_path: Path) -> None:
    source = [{"name": large, "weight": 3}, {"name": small, "weight": 1.5}]
    expected = [Source(large, weight=3), Source(small, weight=1.5)]
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(TextDataModule, "data")
    config = parser.parse_args(
        ["--data.tokenizer=x", f"--data.source={yaml.safe_dump(source, default_flow_style=True)}"]
    )
    assert parser.instantiate_classes(config).data.source == expected

    recipe = tmp_path / "recipe.yaml"
    stage = {"steps": 1, "learning_rate": 1e-3}
    fields = {"name": "x", "teacher": "x", "targets": {}, "stage1": stage, "stage2": stage, "data": {"source": source}}
    recipe.write_text(yaml.safe_dump(fields))
    parser = recipe_parser()
    ready = parser.instantiate_classes(parser.parse_args(["-c", str(recipe)]))
    assert ready.data.source == expected
    assert TextDataModule("x", **dict(ready.data)).weights == [3, 1.5]
