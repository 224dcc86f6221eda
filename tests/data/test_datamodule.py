"""Batches, the held-out split, the cache and the errors of the data module."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from pl_attnedit.data import Source, TextDataModule, datamodule, tokens
from pl_attnedit.data.packing import ResumableSampler, epoch_order
from pl_attnedit.errors import UserError


def make(tokenizer: Any, source: Any, **options: Any) -> TextDataModule:
    data = TextDataModule(tokenizer, source, **{"seq_len": 32, "batch_size": 4, "val_sequences": 8, **options})
    data.setup()
    return data


def documents_in(data: TextDataModule, ids: torch.Tensor) -> set[str]:
    """Which documents of `corpus` these tokens name; a document starts with its number."""
    return {word.split(".")[0] for word in data.tokenizer.decode(ids.flatten().tolist()).split("Document ")[1:]}


def test_batches_are_packed_and_never_padded(tokenizer: Any, corpus: str, make_text: Any) -> None:
    data = make(tokenizer, corpus)
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "loss_mask"}
        assert batch["input_ids"].shape == batch["loss_mask"].shape == (4, 32)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["loss_mask"].dtype == torch.bool
        assert batch["loss_mask"].all()
    joined = torch.cat([item["input_ids"] for item in data.train_sequences])
    assert len(joined) == data.train_sequences.n_tokens // 32 * 32
    texts = tokenizer.decode(joined.tolist()).split("<eos>")[:-1]
    originals = {make_text(seed, 20 + seed) for seed in range(60)}
    assert set(texts) <= originals
    assert len(texts) == len(set(texts))


def test_held_out_documents_never_appear_in_training(tokenizer: Any, corpus: str, make_text: Any) -> None:
    data = make(tokenizer, corpus)
    train = documents_in(data, torch.stack([item["input_ids"] for item in data.train_sequences]))
    held_out = documents_in(data, torch.stack([item["input_ids"] for item in data.held_out]))
    assert held_out
    assert not train & held_out
    texts = data.held_out_texts()
    assert len(texts) + len(data.train_sequences.documents) == 60
    assert set(texts) <= {make_text(seed, 20 + seed) for seed in range(60)}
    assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == 8


def test_split_does_not_depend_on_the_order_of_the_text(
    tokenizer: Any, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    rows = [{"text": make_text(seed, 60)} for seed in range(40)]
    one = make(tokenizer, write_jsonl(rows, "one.jsonl"))
    other = make(tokenizer, write_jsonl([*rows[::-1], *rows], "other.jsonl"), seed=3)  # with every document twice
    assert one.held_out_texts() == other.held_out_texts()
    assert one.fingerprint == other.fingerprint
    assert make(tokenizer, write_jsonl(rows[:-1])).fingerprint != one.fingerprint


def test_no_held_out_document_dominates(tokenizer: Any, write_jsonl: Callable[..., str], make_text: Any) -> None:
    val = [{"text": make_text(0, 5000)}, *({"text": make_text(seed, 200)} for seed in range(1, 9))]
    data = make(
        tokenizer,
        write_jsonl([{"text": make_text(seed, 200)} for seed in range(100, 120)]),
        val_source=write_jsonl(val, "val.jsonl"),
        val_sequences=18,
    )
    chosen = np.array(data._val.indices)
    assert len(set(chosen)) == 18
    counts = np.bincount(data.held_out.first_document(chosen), minlength=9)
    assert counts.tolist() == [2] * 9


def test_documents_of_the_val_source_are_dropped_from_training(
    tokenizer: Any, corpus: str, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    val = write_jsonl([{"text": make_text(seed, 20 + seed)} for seed in range(50, 60)], "val.jsonl")
    data = make(tokenizer, corpus, val_source=val)
    assert len(data.train_sequences.documents) == 50
    assert len(data.held_out_texts()) == 10


def test_position_ids_restart_with_each_document(tokenizer: Any, corpus: str) -> None:
    data = make(tokenizer, corpus, respect_documents=True)
    restarts = 0
    for item in data.train_sequences:
        ids, positions = item["input_ids"].tolist(), item["position_ids"].tolist()
        expected = [0]
        for before in ids[:-1]:
            expected.append(0 if before == tokenizer.eos_token_id else expected[-1] + 1)
        assert positions == expected
        restarts += positions.count(0) - 1
    assert restarts > 20


def test_loss_on_answers_marks_the_position_before(
    tokenizer: Any, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": make_text(i, 6)}, {"role": "assistant", "content": f"Answer {i}."}]}
        for i in range(80)
    ]
    data = make(tokenizer, write_jsonl(rows), loss_on="answers", val_sequences=2)
    items = [data.train_sequences[i] for i in range(len(data.train_sequences))]
    ids = torch.cat([item["input_ids"] for item in items]).tolist()
    mask = torch.cat([item["loss_mask"] for item in items]).tolist()
    supervised = tokenizer.decode([token for token, before in zip(ids[1:], mask[:-1]) if before])
    numbers = [text.removeprefix("Answer ").removesuffix(".") for text in supervised.split("<|im_end|>")[:-1]]
    assert len(numbers) > 60
    assert all(number.isdigit() for number in numbers)
    everything = make(tokenizer, write_jsonl(rows), loss_on="all", val_sequences=2)
    assert everything.train_sequences[0]["loss_mask"].all()


def test_text_beside_chat_is_supervised_entirely(tokenizer: Any, corpus: str, write_jsonl: Callable[..., str]) -> None:
    chat = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]
    data = make(tokenizer, [Source(corpus), write_jsonl(chat)], loss_on="answers", val_sequences=2)
    supervised = torch.cat([item["loss_mask"] for item in data.train_sequences])
    assert 0 < (~supervised).sum() < 30


def test_order_is_shared_by_the_processes_and_new_in_each_epoch(tokenizer: Any, corpus: str) -> None:
    packed = make(tokenizer, corpus).train_sequences

    def epoch(consumed: int, **shard: int) -> list[int]:
        return list(ResumableSampler(packed, 12 // shard.get("num_replicas", 1), 0, lambda: consumed, **shard))

    whole = epoch(0)
    batches = len(whole) // 12
    assert whole == epoch_order(packed.sizes, packed.sizes, 0, 0)[: batches * 12].tolist()
    ranks = [np.reshape(epoch(0, num_replicas=3, rank=rank), (-1, 4)) for rank in range(3)]
    assert np.concatenate(ranks, axis=1).flatten().tolist() == whole
    assert epoch(batches) != whole
    assert epoch(2)[: (batches - 2) * 12] == whole[24:]
    assert epoch(2)[(batches - 2) * 12 :] == epoch(batches)[:24]


def test_text_that_comes_again_is_cut_anew(tokenizer: Any, corpus: str) -> None:
    packed = make(tokenizer, corpus).train_sequences
    total, length = len(packed), packed.seq_len
    text = torch.cat([*(item["input_ids"] for item in packed)])

    def cut(epoch: int) -> int:
        order = np.sort(epoch_order(packed.sizes, packed.sizes, 0, epoch))
        assert order.tolist() == list(range(epoch * total, (epoch + 1) * total))
        rows = packed.__getitems__(order.tolist())["input_ids"]
        first = next(at for at in range(length) if torch.equal(text[at : at + length], rows[0]))
        assert torch.equal(rows[:-1].flatten(), text[first : first + (total - 1) * length])
        return first

    assert [cut(epoch) for epoch in range(3)] == [0, int(0.618 * length), int(0.236 * length)]


def test_second_start_reads_the_cache(tokenizer: Any, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tokenizer, corpus)
    monkeypatch.setattr(tokens, "_write", lambda *args: pytest.fail("tokenised again"))
    second = make(tokenizer, corpus)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train_sequences[3]["input_ids"], second.train_sequences[3]["input_ids"])


def test_a_forked_process_tokenises_without_the_threads_of_its_parent(
    tokenizer: Any, corpus: str, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    TextDataModule(tokenizer, corpus, seq_len=16, val_sequences=4).setup()
    other = write_jsonl([{"text": make_text(seed, 60)} for seed in range(100, 140)], "other.jsonl")
    data = TextDataModule(tokenizer, other, seq_len=16, val_sequences=4)
    process = multiprocessing.get_context("fork").Process(target=data.setup)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_cache_follows_tokenizer_and_loss(tokenizer: Any, corpus: str, cache: Path) -> None:
    make(tokenizer, corpus)
    other = pickle.loads(pickle.dumps(tokenizer))
    other.chat_template = None
    make(other, corpus)
    assert len([folder for folder in (cache / "tokens").iterdir() if folder.is_dir()]) == 2


def test_tokens_take_two_bytes_where_the_vocabulary_fits(tokenizer: Any, corpus: str) -> None:
    small = make(tokenizer, corpus).train_sequences
    large = pickle.loads(pickle.dumps(tokenizer))
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    wide = make(large, corpus).train_sequences
    assert small.corpus.stores[0].tokens.dtype == np.uint16
    assert wide.corpus.stores[0].tokens.dtype == np.int32
    assert torch.equal(small[7]["input_ids"], wide[7]["input_ids"])


def test_a_batch_is_its_items(tokenizer: Any, corpus: str, write_jsonl: Callable[..., str], make_text: Any) -> None:
    chat = [
        {"messages": [{"role": "user", "content": make_text(i, 9)}, {"role": "assistant", "content": make_text(-i, i)}]}
        for i in range(1, 20)
    ]
    options: dict[str, Any] = {"loss_on": "answers", "respect_documents": True, "val_sequences": 2}
    packed = make(tokenizer, [corpus, write_jsonl(chat)], **options).train_sequences
    chosen = [5, 0, len(packed) - 1, 5]
    batch = packed.__getitems__(chosen)
    assert set(batch) == {"input_ids", "loss_mask", "position_ids"}
    for name, rows in batch.items():
        assert torch.equal(rows, torch.stack([packed[index][name] for index in chosen]))
    joined = np.concatenate(
        [
            packed.corpus.stores[packed.corpus.source[d]].tokens[packed.corpus.starts[d] :][: packed.corpus.lengths[d]]
            for d in packed.documents
        ]
    )
    everything = packed.__getitems__(range(len(packed)))["input_ids"]
    assert everything.flatten().tolist() == joined[: len(packed) * 32].tolist()


def test_sequences_travel_to_worker_processes_without_the_tokens(tokenizer: Any, corpus: str) -> None:
    packed = make(tokenizer, corpus).train_sequences
    packed[0]
    copy = pickle.loads(pickle.dumps(packed))
    assert "tokens" not in copy.corpus.stores[0].__dict__
    assert torch.equal(copy[5]["input_ids"], packed[5]["input_ids"])


def test_calibration_batches(tokenizer: Any, corpus: str) -> None:
    data = make(tokenizer, corpus)
    batches = data.calibration_batches(300)
    assert [(list(batch), tuple(batch["input_ids"].shape)) for batch in batches] == [
        (["input_ids"], (size, 32)) for size in (4, 4, 2)
    ]
    again = make(tokenizer, corpus, seed=7).calibration_batches(300)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, again))
    apart = make(tokenizer, corpus, respect_documents=True).calibration_batches(300)
    assert [tuple(batch["position_ids"].shape) for batch in apart] == [(4, 32), (4, 32), (2, 32)]
    assert any(row.count(0) > 1 for batch in apart for row in batch["position_ids"].tolist())
    held_out = {tuple(item["input_ids"].tolist()) for item in data.held_out}
    assert held_out.isdisjoint(tuple(row) for batch in batches for row in batch["input_ids"].tolist())
    for wrong in (0, 10**9):
        with pytest.raises(UserError, match=rf"n_tokens = {wrong}: must be from 1 to \d+, the training split"):
            data.calibration_batches(wrong)


def _asked(make_text: Any, question: int, answers: int, rows: int = 40) -> list[dict[str, Any]]:
    """Conversations with questions of so many words, the last ones without an answer."""
    return [
        {
            "messages": [
                {"role": "user", "content": make_text(i, question)},
                *([{"role": "assistant", "content": "yes"}] if i < answers else []),
            ]
        }
        for i in range(rows)
    ]


def test_text_without_answers_is_an_error_before_anything_runs(
    tokenizer: Any, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    some, none = write_jsonl(_asked(make_text, 10, 40)), write_jsonl(_asked(make_text, 300, 0), "none.jsonl")
    few = write_jsonl(_asked(make_text, 300, 2), "few.jsonl")
    for source, val in ((few, None), (some, none)):
        with pytest.raises(UserError, match=r"loss_on = 'answers': no answer in the 1 held-out .*raise val_seq"):
            make(tokenizer, source, val_source=val, loss_on="answers", val_sequences=1)
    for val in (None, some):
        with pytest.raises(
            UserError, match=r"loss_on = 'answers': no answer in the training sequences of .*none\.jsonl"
        ):
            make(tokenizer, none, val_source=val, loss_on="answers", val_sequences=1)


def test_the_share_of_sequences_without_answers_is_said(
    tokenizer: Any, write_jsonl: Callable[..., str], make_text: Any
) -> None:
    source = write_jsonl(_asked(make_text, 60, 40))
    with pytest.warns(
        UserWarning, match=r"loss_on: answers: \d\d\.\d% of the training sequences of 32 tokens have no"
    ) as said:
        data = make(tokenizer, source, loss_on="answers", val_sequences=20)
    without = sum(not item["loss_mask"].any() for item in data.train_sequences) / len(data.train_sequences)
    assert f"{without:.1%}" in str(said[0].message)


def test_tokenizer_from_a_folder(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    assert make(str(tmp_path / "tok"), corpus).fingerprint == make(tokenizer, corpus).fingerprint
    (tmp_path / "tok" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 16}')
    with pytest.raises(UserError, match="seq_len = 32: must be at most 16, the context of the model"):
        make(str(tmp_path / "tok"), corpus)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer = .*: no tokenizer can be loaded"):
        make(str(tmp_path / "empty"), corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len = 0: must be at least 1"),
        ({"batch_size": -1}, "batch_size = -1: must be at least 1"),
        ({"val_sequences": 0}, "val_sequences = 0: must be at least 1"),
        ({"num_workers": -1}, "num_workers = -1: must be at least 0"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"loss_on": "questions"}, "loss_on = 'questions': must be all or answers"),
        ({"max_context": -5}, "max_context = -5: must be at least 1"),
        ({"seq_len": 64, "max_context": 48}, "seq_len = 64: must be at most 48, the context of the model"),
        ({"source": []}, "source = .*: must name at least one source"),
        ({"val_source": []}, "source = .*: must name at least one source"),
        ({"val_source": Source("builtin:", weight=1)}, "val_source = .*: takes no weight"),
        ({"source": [Source("a.txt", weight=2), "b.txt"]}, "weight = None: either all .* or none; b.txt has none"),
        ({"loss_on": "answers"}, "loss_on = 'answers': needs chat data"),
        ({"seq_len": 100_000}, "seq_len = 100000: the text is shorter than one sequence, it has 3"),
        ({"val_sequences": 5000}, r"val_sequences = 5000: .*60 documents.*allowed are at most [1-9]\d* held-out"),
    ],
)
def test_bad_settings(tokenizer: Any, corpus: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tokenizer, options.pop("source", corpus), **options)


def test_texts_that_are_too_short(tokenizer: Any, corpus: str, write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    short = write_jsonl([{"text": "Short."}], "short.jsonl")
    with pytest.raises(UserError, match="seq_len = 32: the text is shorter than one sequence"):
        make(tokenizer, short)
    with pytest.raises(UserError, match=r"source = .*tokens to train on, one sequence has 32"):
        make(tokenizer, short, val_source=corpus)
    with pytest.raises(UserError, match="val_sequences = 8: the held-out text has 0 of 32 tokens"):
        make(tokenizer, corpus, val_source=short)
    (tmp_path / "blank.txt").write_text(" \n\n ")
    with pytest.raises(UserError, match=r"source = .*blank.txt': holds no documents with text"):
        make(tokenizer, str(tmp_path / "blank.txt"))
    with pytest.raises(UserError, match=r"batch_size = 4000: 1 process\(es\) of it need 4000 training sequences"):
        make(tokenizer, corpus, batch_size=4000).train_dataloader()


def test_tokenizer_without_eos(tokenizer: Any, corpus: str) -> None:
    other = pickle.loads(pickle.dumps(tokenizer))
    other.eos_token = None
    with pytest.raises(UserError, match="must have an end-of-sequence token"):
        make(other, corpus)


def test_command_line_knows_every_argument() -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(TextDataModule, "data")
    source = '["builtin:", {"name": "org/name", "config": "small"}]'
    config = parser.instantiate_classes(parser.parse_args(["--data.tokenizer=x", f"--data.source={source}"]))
    assert config.data.source == ["builtin:", Source("org/name", config="small")]
    help_text = parser.format_help()
    assert "sequences per batch of one process (B)" in help_text
    assert datamodule.TextDataModule.__doc__ is not None
