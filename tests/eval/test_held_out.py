"""A student is judged on text that it was not trained on: by every command, whatever the sizes and names."""

# ruff: noqa: F811  # fixtures
from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures_stages import (  # noqa: F401
    cache_of_tests,
    document,
    make_data,
    make_stage1,
    make_stage2,
    make_trainer,
    session_cache,
    teacher_folder,
    tiny_corpus,
    tiny_tokenizer,
)

from pl_attnedit import UserError
from pl_attnedit.cli import main
from pl_attnedit.conversion.trainers import save_student
from pl_attnedit.data import TextDataModule
from pl_attnedit.data import text as data_text
from pl_attnedit.data.chat import Conversation
from pl_attnedit.data.sources import OpenSource, Source, document_hash, wording_hash
from pl_attnedit.eval import held_out
from pl_attnedit.eval.held_out import held_out_texts, is_trained, trained_on
from pl_attnedit.export import export
from pl_attnedit.modeling.trained_on import FILE, TrainedOn

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--documents", "2", "--cloze", "2", "--seq-len", "64"]


def shipped() -> Iterator[tuple[str, dict[str, Any]]]:
    """The data of every config that trains, and of every variant of a study."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "base" in content:
            base = yaml.safe_load((path.parent / content["base"]).read_text())["data"]
            base |= content.get("change", {}).get("data", {})
            for name, variant in content["variants"].items():
                yield f"{path.stem}-{name}", base | (variant or {}).get("data", {})
        elif "data" in content:
            yield path.stem, content["data"]


def as_source(value: Any) -> Any:
    if isinstance(value, list):
        return [Source(**each) for each in value]
    return value["name"] if isinstance(value, dict) else value


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By source, documents that have a length each, in place of what the sources hold; any other name has the first's."""
    rng = np.random.default_rng(0)
    names = [f"document {i}" for i in range(1700)]
    lengths = {document_hash(name): int(rng.lognormal(6.3, 1.0)) + 16 for name in names}
    found = {"train": names[:1200], "heldout": names[1100:1500], "lookups": names[1500:]}

    def opened(source: Any) -> OpenSource:
        name = as_source(source) if isinstance(source, str) else source.name
        chosen = found[next((part for part in ("lookups", "heldout") if part in name), "train")]
        return OpenSource(name, name, lambda: iter(chosen))

    def tokenized(sources: Sequence[OpenSource], *_: Any) -> list[Any]:
        stores = []
        for source in sources:
            hashes = np.array([document_hash(text) for text in source.documents()], np.uint64)
            starts = np.cumsum([0, *(lengths[key] for key in hashes.tolist())])
            tokens = np.broadcast_to(np.uint16(0), starts[-1])
            same = dict.fromkeys(("hashes", "wordings", "token_hashes"), hashes)
            stores.append(SimpleNamespace(**same, starts=starts, tokens=tokens, answers=None))
        return stores

    def decoded(data: TextDataModule) -> list[str]:
        by_hash = {document_hash(name): name for name in names}
        return [by_hash[key] for key in data.held_out.corpus.hashes[data.held_out.documents].tolist()]

    monkeypatch.setattr(data_text, "open_source", opened)
    monkeypatch.setattr(held_out, "open_source", opened)
    monkeypatch.setattr(data_text, "tokenize", tokenized)
    monkeypatch.setattr(TextDataModule, "held_out_texts", decoded)
    return found


@pytest.mark.parametrize(("name", "options"), shipped(), ids=[name for name, _ in shipped()])
def test_nothing_that_a_shipped_config_trains_on_is_asked(
    name: str, options: dict[str, Any], texts: dict[str, list[str]], tiny_tokenizer: Any
) -> None:
    given = {key: as_source(value) for key, value in options.items()}
    texts_asked = {given["source"], "builtin:"} if isinstance(given["source"], str) else {given["val_source"]}
    if isinstance(given["source"], list):  # lookups: takes no text that is held out, so all of it is trained on
        del texts["heldout"][:100]
    trained = TextDataModule(tiny_tokenizer, **given, max_context=8192).training_documents
    for text in texts_asked:
        for whole in (True, False):
            asked = held_out_texts(tiny_tokenizer, text, trained, whole=whole)
            hashes = np.array([document_hash(each) for each in asked.texts], np.uint64)
            assert len(hashes)
            assert not trained.has(hashes).any()


def test_text_with_a_token_that_the_model_lacks(
    teacher_folder: Callable[..., str], tmp_path: Path, cache_of_tests: None
) -> None:
    """Whose number alone says so: the tokenizer has no more tokens than the model."""
    folder = Path(shutil.copytree(teacher_folder(), tmp_path / "teacher"))
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["vocab"]["Q"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    for text, refused in {"plain": False, "Q": True}.items():
        rows = [json.dumps({"text": f"{document(i, 60)} {text}"}) + "\n" for i in range(20)]
        (tmp_path / "text.jsonl").write_text("".join(rows))
        source = str(tmp_path / "text.jsonl")
        for read in (
            lambda source=source: held_out_texts(str(folder), source, TrainedOn()),
            lambda source=source: TextDataModule(str(folder), source, seq_len=32, val_sequences=2).setup(),
        ):
            with pytest.raises(UserError, match="has token 5000, 'Q'; must be below") if refused else nullcontext():
                read()


def test_without_what_the_student_says_most_is_asked_again(texts: dict[str, list[str]], tiny_tokenizer: Any) -> None:
    """What the defaults would ask students of the stages' configs."""
    trained = TextDataModule(tiny_tokenizer, seq_len=512, val_sequences=16, max_context=8192).training_documents
    asked = held_out_texts(tiny_tokenizer, "builtin:", TrainedOn())
    assert trained.has(np.array([document_hash(each) for each in asked.texts], np.uint64)).mean() > 0.5


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def student(make_stage1: Any, make_data: Any, paths: dict[str, Any]) -> Path:
    """Trained for a step; its checkpoint lies beside it."""
    folder = paths["folder"] / "student"
    if not folder.exists():
        trainer = make_trainer(steps=1)
        trainer.fit(make_stage1(), paths.setdefault("data", make_data()))
        trainer.save_checkpoint(folder.parent / "last.ckpt")
        folder.mkdir()
        save_student(trainer.lightning_module, folder)
    return folder


def rows_of(data: TextDataModule) -> set[int]:
    return set(data.training_documents.documents.tolist())


def test_students_and_checkpoints_say_what_they_were_trained_on(
    student: Path, paths: dict[str, Any], tmp_path: Path
) -> None:
    for path in (student, student.parent / "last.ckpt"):
        found = trained_on(path)
        assert set(found.documents.tolist()) == rows_of(paths["data"])
        assert found.complete
    assert (student / FILE).stat().st_size < 8 * len(found.documents) + 1000


def test_export_carries_it(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export.__globals__["FORMATS"], "mine", lambda model, folder: None)
    assert np.array_equal(
        trained_on(export(student, tmp_path / "out", "mine")).documents, trained_on(student).documents
    )


def test_a_chain_inherits(
    student: Path, make_stage2: Any, make_data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a student starts from was trained on is not held out, when it trains and when it is validated."""
    before, data = trained_on(student), make_data(val_sequences=60)
    wanted = len(data.held_out.documents)
    module, trainer = make_stage2(init_from=str(student)), make_trainer(steps=1, limit_val_batches=1.0)
    trainer.fit(module, data)
    kept = data.held_out.corpus.hashes[data.held_out.documents]
    assert 0 < len(kept) < wanted
    assert not before.has(kept).any()
    assert f"left out {wanted - len(kept)} of {wanted} held-out documents" in caplog.text
    assert set(module.trained_on().documents.tolist()) == rows_of(data) | set(before.documents.tolist())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = make_data(val_sequences=60)
    trainer.validate(make_stage2(init_from=str(student)), again, str(tmp_path / "last.ckpt"), verbose=False)
    assert len(again.held_out.documents) == len(kept)
    (student / FILE).rename(student / "away")
    try:
        trainer.validate(module := make_stage2(init_from=str(student)), make_data(), verbose=False)
    finally:
        (student / "away").rename(student / FILE)
    assert not module.trained_on().complete


def test_validate_refuses_what_was_all_trained_on(
    student: Path, make_stage2: Any, make_data: Any, tmp_path: Path
) -> None:
    known = trained_on(student).has
    rows = [document(seed, 400 + seed) for seed in range(60)]
    seen = [row for row in rows if known(np.array([document_hash(row)], np.uint64))[0]]
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in seen))
    data = make_data(val_source=str(tmp_path / "seen.jsonl"))
    with pytest.raises(UserError, match=r"val_source = .*seen\.jsonl': the student was trained on"):
        make_trainer().validate(make_stage2(init_from=str(student)), data, verbose=False)


@pytest.fixture
def evaluate(student: Path, teacher_folder: Callable[..., str], tmp_path: Path) -> Callable[..., Any]:
    """`evaluate(text, *options)`: the status, and the settings of results.json."""

    def run(text: Any, *options: str) -> tuple[int, dict[str, Any]]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        suite = [] if "--suite" in options else SMALL
        command = [
            "eval",
            str(student),
            "--teacher",
            teacher_folder(),
            "--text",
            str(text),
            "--out",
            str(tmp_path / "out"),
        ]
        status = main([*command, *suite, *options])
        results = tmp_path / "out" / "results.json"
        return status, json.loads(results.read_text())["settings"] if results.exists() else {}

    return run


@pytest.mark.parametrize("by", ["tasks", "suite"])
def test_eval_asks_others(
    by: str, evaluate: Any, student: Path, tiny_corpus: str, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    known = trained_on(student)
    suite = {"name": "small", "max_length": 64, "text": {"documents": 2, "document_chars": 200, "cloze": 2}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | {"bigbench": {"limit": 9}}))
    questions = [{"question": f"who {i}", "choices": ["a", "b"], "answer": 0} for i in range(3)]
    rows = [json.loads(line)["text"] for line in Path(tiny_corpus).read_text().splitlines()]
    seen = [row for row in rows if known.has(np.array([document_hash(row)], np.uint64))[0]]
    questions += [{**questions[0], "question": seen[0]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = (
        ["--suite", str(tmp_path / "suite.yaml"), "--bigbench", str(tmp_path / "q.jsonl")] if by == "suite" else []
    )
    grown = tmp_path / "other name.jsonl"
    more = [document(seed, 90) for seed in range(100, 103)]
    grown.write_text("".join(json.dumps({"text": row}) + "\n" for row in [*more, *rows]))
    status, settings = evaluate(grown, *options)
    assert status == 0
    assert settings["documents_left_out"] == len(seen)
    assert settings["documents"] == len(rows) - len(seen) + len(more)
    asked = "".join(path.read_text() for path in (tmp_path / "out").glob("samples_*.jsonl"))
    assert not any(row[:60] in asked for row in seen)
    assert (by == "suite") == ("left out 1 of 4 questions" in caplog.text)
    grown.write_text("".join(json.dumps({"text": row}) + "\n" for row in seen))
    capsys.readouterr()
    caplog.clear()
    status, settings = evaluate(grown, *options)
    assert (status, settings) == (2, {})
    assert capsys.readouterr().err.splitlines()[-1].endswith("the student was trained on all of it; name other text")
    assert "left out" not in caplog.text


def test_text_with_pieces_of_other_text_judges_nobody(evaluate: Any, capsys: Any) -> None:
    assert evaluate("lookups:x.txt") == (2, {})
    assert "--text = 'lookups:x.txt': must be text as it is, lookups: is for training\n" in capsys.readouterr().err


def test_a_text_file_that_has_grown(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Its last passage is another document then, and begins as the one before."""
    file = tmp_path / "notes.txt"
    paragraphs = [document(seed, 300) + f"\nLine {seed}." for seed in range(60)]
    file.write_text("\n\n".join(paragraphs) + "\n")
    every = TextDataModule(tiny_tokenizer, str(file), 16, 1, val_sequences=1)
    corpus = every.train_sequences.corpus
    trained = TrainedOn(np.unique(corpus.hashes))
    for more in ("and on.\n", "\n\nMore.\n"):
        file.write_text(
            "\n\n".join(paragraphs) + "\n" + more + "\n\n" + "\n\n".join(document(s, 300) for s in range(90, 150))
        )
        asked = held_out_texts(tiny_tokenizer, str(file), trained)
        assert asked.left_out == len(corpus)
        assert asked.texts
        assert not any(paragraph in text for text in asked.texts for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("known", "asked"),
    [("a\nb", "a\nb\n"), ("a\nb\n", "a\nb"), ("a\r\nb", "a\nb"), ("a\nb", " a\r\nb\r\n"), ("a\nb", "a\r\nb\r\nc")],
)
def test_line_ends_and_white_space_make_no_other_text(known: str, asked: str) -> None:
    assert is_trained(asked, TrainedOn(np.array([document_hash(known)], np.uint64)))
    assert not is_trained(asked, TrainedOn(np.array([document_hash("b")], np.uint64)))


FORMS = [
    lambda text: text + "\n",
    lambda text: text.replace("\n\n", " \r\n"),
    lambda text: "\ufeff" + unicodedata.normalize("NFD", text).replace(" ", "\u00a0"),
]


@pytest.mark.parametrize("form", FORMS, ids=["line feed", "line ends", "accents"])
def test_the_same_text_in_another_form_is_not_held_out(
    form: Callable[[str], str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [f"Café {seed}.\n\n" + document(seed, 60) for seed in range(40)]
    for name, some in {
        "rows": rows,
        "others": [form(row) for row in rows[:10]],
        "both": [*rows, *map(form, rows)],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in some))
    made = partial(TextDataModule, tiny_tokenizer, seq_len=32, val_sequences=4)
    data = made(str(tmp_path / "rows.jsonl"), val_source=str(tmp_path / "others.jsonl"))
    assert len(data.train_sequences.documents) == 30
    trained = data.training_documents
    assert [is_trained(form(row), trained) for row in rows] == [False] * 10 + [True] * 30
    both = made(str(tmp_path / "both.jsonl"))
    asked = both.held_out_texts()
    assert asked
    assert not any(is_trained(text, both.training_documents) for text in asked)
    assert both.leave_out(TrainedOn(np.array([wording_hash(asked[0])], np.uint64))) == 1


def test_the_same_conversation_in_another_form() -> None:
    plain = Conversation([{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "c"}])
    parts = [{"role": one["role"], "content": [{"type": "text", "text": one["content"] + "\n"}]} for one in plain]
    assert wording_hash(Conversation(parts, {"tools": []})) == wording_hash(plain)
    assert wording_hash(Conversation(plain, {"tools": [{"name": "f"}]})) != wording_hash(plain)
    assert wording_hash(Conversation(plain[:1])) != wording_hash(plain)


def test_long_runs_of_spaces_are_looked_through_once() -> None:
    known = TrainedOn(np.array([document_hash("a")], np.uint64))
    assert is_trained("a\nb" + " " * 1_000_000 + "c", known)  # an hour where each space begins a run of its own


def test_fields_that_are_null_make_no_other_conversation() -> None:
    """Every row of a parquet file has all of them."""
    call = {"function": {"name": "run", "arguments": {"all": None}}}
    rows = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "tool_calls": [call]}]
    assert document_hash(Conversation(rows)) == document_hash(
        Conversation(
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [_bare(call)], "name": None}]
        )
    )
    assert document_hash(Conversation(rows)) != document_hash(Conversation(rows[:1]))


def _bare(call: dict[str, Any]) -> dict[str, Any]:
    return {"function": {**call["function"], "arguments": {}}}


def test_a_student_that_says_nothing_is_evaluated_with_a_word(
    student: Path, evaluate: Callable[..., Any], tiny_corpus: str, caplog: pytest.LogCaptureFixture
) -> None:
    (student / FILE).rename(student / "away")
    try:
        status, settings = evaluate(tiny_corpus)
    finally:
        (student / "away").rename(student / FILE)
    assert status == 0
    assert f"{student} does not say what it was trained on" in caplog.text
    assert settings["documents_left_out"] == 0


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for content in (b"", b"no archive"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(UserError, match=f"{FILE}' *: is broken"):
            trained_on(tmp_path)
