"""Text written by a teacher: where it begins, that it repeats itself by seed, and that an interrupted run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit import UserError
from pl_attnedit.data import TextDataModule, generated
from pl_attnedit.data.generated import Sampling, TeacherWriter, generate_data

QUICK = {"max_tokens": 12, "batch_size": 4}
Write = Callable[..., TeacherWriter]


@pytest.fixture
def teacher(make_teacher: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    teacher = make_teacher("llama", vocab_size=len(tokenizer))
    teacher.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=2.0)  # none of it must have an effect
    return teacher


@pytest.fixture
def writer(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Write:
    return lambda **options: TeacherWriter(teacher, tokenizer, Sampling(**{**QUICK, **options}))


def test_samples_follow_the_teachers_distribution(writer: Write, teacher: PreTrainedModel) -> None:
    """The first token of many short texts, against the probabilities; the model's own config would always take the same."""
    one = writer(prompts="none", max_tokens=1, batch_size=4000)
    torch.manual_seed(0)
    [start] = one.beginning
    drawn = torch.tensor([ids[0] if ids else one.stops[0] for ids in one._continue([[start]] * 4000)])
    found = torch.bincount(drawn, minlength=teacher.config.vocab_size) / 4000
    with torch.no_grad():
        expected = teacher(input_ids=torch.tensor([[start]])).logits[0, -1].softmax(-1)
    assert (found - expected).abs().sum() < 0.35  # the mean of 4000 true draws from some 300 tokens is about 0.2
    assert found.max() < 0.5


def test_chat_asks_and_answers(writer: Write, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ends = list(range(100, 160))
    teacher.generation_config.eos_token_id = ends  # so that a random model ends its turns
    texts = writer().write(0)
    assert texts
    for text in texts:
        assert text.startswith("<|im_start|>user\n")
        question, answer = text.removeprefix("<|im_start|>user\n").split("<|im_end|>\n", 1)
        assert question.strip()
        assert tokenizer.eos_token not in answer
    assert writer(seed=1).write(0) != texts
    for ids in writer()._continue([[1], [1, 2, 3]] * 4):  # the end is not part of a turn, nor is what follows it
        assert not {*ends, tokenizer.eos_token_id} & set(ids)


def test_prompts_from_a_file(writer: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "prompts.txt").write_text("Which word?\n\nthe model\nreads\n")
    asked = writer(prompts=str(tmp_path / "prompts.txt")).write(1)
    messages = [text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0] for text in asked]
    assert messages == ["the model", "reads", "Which word?", "the model"]  # the second batch of four


def test_interrupted_run_goes_on_and_gives_the_same_file(
    writer: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, parted = tmp_path / "whole.parquet", tmp_path / "parted.parquet"
    assert generate_data(writer(prompts="none"), "tiny", whole, 200)[1] >= 200

    def stop(documents: int, tokens: int) -> None:
        if tokens > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_data(writer(prompts="none"), "tiny", parted, 200, stop)
    with pytest.raises(UserError, match=r"begun with other settings \(seed differ\)"):
        generate_data(writer(prompts="none", seed=3), "tiny", parted, 200)
    again = writer(prompts="none")
    numbers: list[int] = []
    again_write = again.write
    again.write = lambda number: numbers.append(number) or again_write(number)  # type: ignore[method-assign,func-returns-value]
    documents, _ = generate_data(again, "tiny", parted, 200)
    assert numbers[0] > 0
    table = pq.read_table(parted)
    assert table.equals(pq.read_table(whole))
    assert table.column_names == ["text", "source"]
    assert len(set(table["text"].to_pylist())) == len(table) == documents
    assert [file.name for file in tmp_path.glob("parted*")] == ["parted.parquet"]
    with pytest.raises(UserError, match="is there already"):
        generate_data(again, "tiny", parted, 200)

    data = TextDataModule(tokenizer, str(parted), seq_len=16, batch_size=2, val_sequences=2)
    assert len(data.train_sequences) >= 2


def begun(writer: TeacherWriter, path: Path) -> Path:
    """The folder of a run that was stopped after its first batch."""

    def stop(documents: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_data(writer, "tiny", path, 200, stop)
    return path.with_name(path.name + ".parts")


def test_a_run_is_of_one_dtype_and_of_the_same_prompts(writer: Write, tmp_path: Path) -> None:
    prompts, path = tmp_path / "prompts.txt", tmp_path / "x.parquet"
    prompts.write_text("the model\n")
    begun(writer(prompts=str(prompts)), path)
    prompts.write_text("the other\n")
    with pytest.raises(UserError, match=r"\(prompts_content differ\)"):
        generate_data(writer(prompts=str(prompts)), "tiny", path, 200)
    prompts.write_text("the model\n")
    coarse = writer(prompts=str(prompts))
    coarse.teacher.bfloat16()
    with pytest.raises(UserError, match=r"\(dtype differ\)"):
        generate_data(coarse, "tiny", path, 200)


@pytest.mark.parametrize("name", ["000000.parquet", "settings.json"])
def test_a_broken_part_is_named(name: str, writer: Write, tmp_path: Path) -> None:
    parts = begun(writer(prompts="none"), tmp_path / "x.parquet")
    (parts / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"output = '{parts / name}': is broken .*; remove {parts} to begin anew"):
        generate_data(writer(prompts="none"), "tiny", tmp_path / "x.parquet", 200)


def test_a_prompt_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lines.txt").write_bytes("\ufeffone\u2028two\r\n\r\n three ".encode())
    assert generated._lines("~/lines.txt") == ["one\u2028two", "three"]
    with pytest.raises(UserError, match=r"prompts = '.*none\.txt': must be auto, chat, none or a text file"):
        generated._lines(str(tmp_path / "none.txt"))


def test_prompts_that_are_no_utf8(writer: Write, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt': must be UTF-8 text: line 1, byte 2 is none"):
        writer(prompts=str(tmp_path / "latin.txt"))


def test_nothing_new_is_an_error(writer: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "FRUITLESS_BATCHES", 2)
    always_the_same = writer(prompts="none", temperature=1e-4)
    with pytest.raises(UserError, match="2 batches brought no new text"):
        generate_data(always_the_same, "tiny", tmp_path / "x.parquet", 10**6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_writes_the_same(writer: Write, teacher: PreTrainedModel, tmp_path: Path) -> None:
    """Its step is compiled, its cache static; the batch, smaller than it was compiled for, is filled up."""
    (tmp_path / "prompts.txt").write_text("Which word?\nthe model reads what it\nand\n")
    likeliest = writer(prompts=str(tmp_path / "prompts.txt"), temperature=1e-4, batch_size=5)
    prompts = [likeliest._ids(line) for line in likeliest.lines]
    expected = likeliest._continue(prompts)
    teacher.cuda()
    assert likeliest._continue(prompts) == expected


def test_parts_without_text_bind_nobody(writer: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "FRUITLESS_BATCHES", 1)
    silent = writer(prompts="none")
    silent.write = lambda number: []  # type: ignore[method-assign]
    for _ in "ab":
        with pytest.raises(UserError, match="1 batches brought no new text"):
            generate_data(silent, "tiny", tmp_path / "x.parquet", 100)
    assert generate_data(writer(prompts="none", seed=3), "tiny", tmp_path / "x.parquet", 100)[1] >= 100


def test_one_process_writes_a_file(writer: Write, tmp_path: Path) -> None:
    def meanwhile(documents: int, tokens: int) -> None:
        with pytest.raises(UserError, match="is being written by another process"):
            generate_data(writer(prompts="none"), "tiny", tmp_path / "x.parquet", 50)

    assert generate_data(writer(prompts="none"), "tiny", tmp_path / "x.parquet", 50, meanwhile)[1] >= 50


def test_a_prompt_that_fills_the_context_is_named(writer: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"short\nlong {'word ' * 600}\n")
    with pytest.raises(UserError, match=r"the line that begins 'long word word.* leaves no room for a text"):
        writer(prompts=str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature = 0: must be at least 1e-6"),
        ({"temperature": math.nan}, "temperature = nan: must be at least 1e-6"),
        (
            {"max_tokens": 10**6, "prompts": "none"},
            "max_tokens = 1000000: must be at most 511, by the teacher's context",
        ),
        ({"max_tokens": 256}, "max_tokens = 256: must be at most "),
        ({"top_p": 1.5}, "top_p = 1.5: must be above 0"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"prompts": "none.txt"}, "prompts = 'none.txt': must be auto, chat, none or a text file"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, writer: Write) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        writer(**options)
