"""What each key holds (README: "What is kept"): every input, changed alone, changes it; and what is no input does not."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_stages import cache_of_tests, document, framed, session_cache  # noqa: F401
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import UserError
from pl_attnedit.conversion.run_folder import RunFolder
from pl_attnedit.data import TextDataModule, tokens
from pl_attnedit.data.generated import Sampling, TeacherWriter, generate_data
from pl_attnedit.data.sources import Source, open_source
from pl_attnedit.eval.fidelity.by_position import teacher_hidden
from pl_attnedit.eval.harness import answers
from pl_attnedit.eval.harness import paired as harness
from pl_attnedit.eval.harness.answers import TaskRequest, circumstances
from pl_attnedit.eval.harness.paired import answer_both
from pl_attnedit.eval.harness.suites import Efficiency, LibraryTask, PositionTask, RetrievalTasks, Suite, TextTasks
from pl_attnedit.eval.harness.tasks import CHOICES, CLOZE_TASK, build_offline_tasks, write_task
from pl_attnedit.teachers.sources import fingerprint
from pl_attnedit.teachers.sources.fingerprint import file_sha256, model_fingerprint

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def retokenized(change: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if change == "post-processor":
        return framed(tokenizer, "bos")
    other = framed(tokenizer, "none")
    if change == "vocabulary":
        other.add_tokens(["of text"])
    elif change == "chat template":
        other.chat_template = CHAT + "!"
    elif change == "BOS that a template names":
        other.bos_token = other.eos_token
    elif change == "special tokens in text":
        other.split_special_tokens = True
    return other


TOKENIZERS = ["post-processor", "vocabulary", "chat template", "BOS that a template names", "special tokens in text"]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`libraries(name)`: another version of a library."""

    def change(name: str) -> None:
        for module in (tokens, answers):
            real = module.version
            monkeypatch.setattr(module, "version", lambda each, real=real: "9" if each == name else real(each))

    return change


@pytest.mark.parametrize(
    "change",
    [*TOKENIZERS, "text", "column", "ending", "loss_on", "our code", "transformers", "tokenizers", "nothing", "name"],
)
def test_tokens(
    change: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    libraries: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = framed(tokenizer, "none")
    base.chat_template = CHAT
    other = retokenized(change, base) if change in TOKENIZERS else base
    messages = [{"role": "user", "content": "of text"}]
    rows = [{"text": "all", "other": "of text", "messages": messages}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    content = "\n".join(map(json.dumps, rows[:1] if change == "text" else rows)) + "\n"
    file = tmp_path / {"ending": "b.txt", "name": "another.jsonl"}.get(change, "b.jsonl")
    file.write_text(content)
    [before] = tokens.tokenize([open_source(str(tmp_path / "a.jsonl"))], base, "all")
    if change in ("transformers", "tokenizers"):
        libraries(change)
    if change == "our code":
        monkeypatch.setattr(tokens, "VERSION", tokens.VERSION + 1)
    opened = open_source(Source(str(file), column="other" if change == "column" else None))
    [after] = tokens.tokenize([opened], other, "answers" if change == "loss_on" else "all")
    assert (after.path == before.path) == (change in ("nothing", "name"))


DATA: dict[str, dict[str, Any]] = {
    "text": {"source": "other.jsonl"},
    "held-out text": {"val_source": "other.jsonl"},
    "length": {"seq_len": 16},
    "held-out sequences": {"val_sequences": 40},
    "documents apart": {"respect_documents": True},
    "weights": {"source": [Source("text.jsonl", weight=1), Source("other.jsonl", weight=2)]},
    "other weights": {"source": [Source("text.jsonl", weight=1), Source("other.jsonl", weight=3)]},
    "tokenizer": {},
    "seed": {"seed": 1},
    "batch": {"batch_size": 2},
    "file": {"source": "renamed.jsonl"},
}


def test_data_fingerprint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seeds in {"text": range(30), "renamed": range(30), "other": range(20, 60)}.items():
        lines = [json.dumps({"text": document(seed, 60)}) + "\n" for seed in seeds]
        Path(f"{name}.jsonl").write_text("".join(lines))
    base = framed(tokenizer, "none")
    found = {"nothing": TextDataModule(base, "text.jsonl", seq_len=32, val_sequences=4).fingerprint}
    for name, change in DATA.items():
        options = {"source": "text.jsonl", "seq_len": 32, "val_sequences": 4, **change}
        found[name] = TextDataModule(framed(tokenizer, "bos") if name == "tokenizer" else base, **options).fingerprint
    same = {"nothing", "seed", "batch", "file"}
    assert {name for name in found if found[name] == found["nothing"]} == same
    assert len(set(found.values())) == len(found) - len(same) + 1


def test_data_fingerprint_sees_tokens_whatever_made_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no key knows why."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": document(s, 60)}) + "\n" for s in range(30)))
    found = []
    for folder in ("one", "two"):
        monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / folder))
        found.append(TextDataModule(tokenizer, str(tmp_path / "text.jsonl"), seq_len=32, val_sequences=4).fingerprint)
        real = tokens._encode
        changed = lambda *args, real=real: (([*ids[:-2], 7, ids[-1]], marked) for ids, marked in real(*args))  # noqa: E731
        monkeypatch.setattr(tokens, "_encode", changed)
    assert found[0] != found[1]


@pytest.fixture
def asks(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[str], tmp_path: Path, monkeypatch: Any
) -> Callable[..., bool]:
    """`asks(**changes)`: whether the teacher is asked, or its answers were kept."""
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))
    sizes = {"n_documents": 2, "document_chars": 100, "context_chars": 60, "continuation_chars": 20}
    model, real = copy.deepcopy(teacher), harness.answer
    model.resize_token_embeddings(len(tokenizer) + 2)
    asked: list[str] = []
    monkeypatch.setattr(harness, "answer", lambda lm, *rest: asked.append(lm.name) or real(lm, *rest))  # type: ignore[func-returns-value]

    def ask(tokenizer: Any, task: int = 0, fingerprint: str = "teacher", **options: Any) -> bool:
        asked.clear()
        model.generation_config.repetition_penalty = options.pop("penalty", 1.0)
        build_offline_tasks(documents, tmp_path / "tasks", n_cloze=4, seed=task, **sizes)
        requests = [TaskRequest(CLOZE_TASK, tmp_path / "tasks", limit=options.pop("limit", None))]
        model.to(options.pop("dtype", torch.float32))
        settings = {"max_length": 64, "batch_size": 2, "teacher_fingerprint": fingerprint, **options}
        answer_both(model, model, tokenizer, requests, **settings)
        assert "student" in asked
        return "teacher" in asked

    return ask


ANSWERS: dict[str, dict[str, Any]] = {
    "teacher": {"fingerprint": "another"},
    "length": {"max_length": 63},
    "questions": {"task": 1},
    "limit": {"limit": 2},
    "batch": {"batch_size": 1},
    "dtype": {"dtype": torch.bfloat16},
    "generation": {"penalty": 1.5},
}


@pytest.mark.parametrize(
    "change", [*ANSWERS, *TOKENIZERS, "our code", "transformers", "tokenizers", "lm_eval", "nothing"]
)
def test_answers(
    change: str,
    asks: Callable[..., bool],
    tokenizer: PreTrainedTokenizerFast,
    libraries: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = framed(tokenizer, "none")
    assert asks(base)
    if change in ("transformers", "tokenizers", "lm_eval"):
        libraries(change)
    if change == "our code":
        monkeypatch.setattr(answers, "VERSION", answers.VERSION + 1)
    other = retokenized(change, base) if change in TOKENIZERS else base
    assert asks(other, **ANSWERS.get(change, {})) == (change != "nothing")


@pytest.mark.parametrize("file", ["asked", "examples"])
def test_questions_and_their_examples(file: str, tmp_path: Path) -> None:
    task = {"task": "sums", "dataset_path": "json", "test_split": "test", "fewshot_split": "shots", "num_fewshot": 1}
    task |= {
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/asked.jsonl", "shots": f"{tmp_path}/examples.jsonl"}}
    }
    task |= {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_target": 0, "doc_to_choice": ["1", "2"]}
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    digests = set()
    for question in ("one", "two"):
        for name in ("asked", "examples"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"q": question if name == file else "same"}) + "\n")
        digests.add(answers.load_tasks([TaskRequest("sums", tmp_path)])["sums"][0].digest)
    assert len(digests) == 2


def test_tasks_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    digests = set()
    for folder in (tmp_path / "here", tmp_path / "there"):
        rows = [{"question": "2 + 2 =", "answer": 0}, {"question": "3 + 3 =", "answer": 1}]
        write_task(folder, "sums", rows, doc_to_text="question", **{**CHOICES, "doc_to_choice": ["4", "6"]})
        digests.add(answers.load_tasks([TaskRequest("sums", folder)])["sums"][0].digest)
    assert len(digests) == 1


def test_hidden_states(teacher: PreTrainedModel, tmp_path: Path) -> None:
    """Their folder stands for the circumstances, their file for the tokens."""
    ids = torch.arange(1, 9).view(2, 4)
    for text in (ids, ids.view(1, 8), ids + 1, ids):
        teacher_hidden(teacher, text, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_circumstances(teacher: PreTrainedModel) -> None:
    def of(**changes: Any) -> dict[str, Any]:
        here = {"dtype": teacher.dtype, "device": teacher.device, "generation_config": teacher.generation_config}
        return circumstances(SimpleNamespace(**{**here, **changes}))  # type: ignore[arg-type]

    generation = copy.deepcopy(teacher.generation_config)
    generation.repetition_penalty = 1.3
    assert of() == circumstances(teacher) == of(device=torch.device("cpu", 0))
    for change in ({"dtype": torch.float16}, {"device": torch.device("cuda", 1)}, {"generation_config": generation}):
        assert of(**change) != of()


def test_teacher_fingerprint(teacher: PreTrainedModel, tmp_path: Path) -> None:
    model = copy.deepcopy(teacher)

    def fingerprint(name: str) -> str:
        model.save_pretrained(tmp_path / name)
        return model_fingerprint(tmp_path / name)

    first = fingerprint("a")
    assert fingerprint("b") == first
    model.config.rope_parameters["rope_theta"] = 5.0
    assert fingerprint("c") != first
    model.config.rope_parameters["rope_theta"] = teacher.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint("d") != first


def test_a_digest_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of equal size may bring the old modification time along."""
    monkeypatch.setattr(fingerprint, "_DIGEST_CACHED_FROM", 0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    before = file_sha256(file)
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert file_sha256(file) != before


def test_suite_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base: dict[str, Any] = {"name": "a"}
    changes: list[dict[str, Any]] = [{"name": "b"}, {"max_length": 9}, {"margins": {"x": 1.0}}]
    changes += [{"text": TextTasks()}, {"text": TextTasks(cloze=9)}, {"by_position": PositionTask(2)}]
    changes += [{"retrieval": RetrievalTasks()}, {"efficiency": Efficiency([9])}, {"library": [LibraryTask("x")]}]
    versions = [Suite(**{**base, **change}).version for change in [{}, *changes]]
    assert len(set(versions)) == len(versions)
    assert Suite(**base).version == versions[0] == Suite(**base).version_on("builtin:", [])
    for name in ("a", "b", "q", "r", "a again"):
        Path(f"{name}.jsonl").write_text(name[0])
    questions = [
        ("a.jsonl", None),
        ("a again.jsonl", None),
        ("b.jsonl", None),
        ("builtin:", "q.jsonl"),
        ("builtin:", ["q.jsonl", "r.jsonl"]),
    ]
    asked = {Suite(**base).version_on(text, files) for text, files in questions}
    assert len(asked | {versions[0]}) == 5


def test_a_run_folder_is_of_one_teacher_and_one_text(tmp_path: Path) -> None:
    inputs = {"teacher": "t", "text": "x"}
    folder = RunFolder(tmp_path / "run", {"name": "run"})
    folder.keep_to(inputs)
    folder.start()
    folder.keep_to(inputs)
    folder._lock.close()
    again = RunFolder(tmp_path / "run", {"name": "run"})
    for name in inputs:
        with pytest.raises(UserError, match=f"run: was begun with another {name} under the same name"):
            again.keep_to({**inputs, name: "other"})


@pytest.mark.parametrize("change", ["fingerprint", "tokenizer"])
def test_what_a_teacher_writes(change: str, teacher: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def stop(documents: int, tokens: int) -> None:
        raise KeyboardInterrupt

    def write(tokenizer: Any, fingerprint: str) -> None:
        writer = TeacherWriter(teacher, tokenizer, Sampling("none", max_tokens=8, batch_size=2))
        generate_data(writer, "tiny", tmp_path / "x.parquet", 99, stop, fingerprint)

    with pytest.raises(KeyboardInterrupt):
        write(tokenizer, "a")
    with pytest.raises(UserError, match=rf"\({change} differ\)"):
        write(
            framed(tokenizer, "none") if change == "tokenizer" else tokenizer, "b" if change == "fingerprint" else "a"
        )
