"""A saved student against its teacher by a suite, as `pl-attnedit eval` does it."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fake_conversions import log_fake_conversion
from fixtures_stages import cache_of_tests, session_cache, teacher_folder, tiny_corpus, tiny_tokenizer  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import GateSWAConfig, edit_model
from pl_attnedit.cli import main
from pl_attnedit.eval.harness.paired import evaluate_pair
from pl_attnedit.eval.harness.tasks import write_task
from pl_attnedit.eval.records import find_conversions
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.teachers.sources.resolve import load_teacher
from pl_attnedit.tracking import connect

SUITE = {
    "name": "small",
    "text": {"documents": 4, "document_chars": 400, "cloze": 8},
    "by_position": {"sequences": 2, "context": 128},
    "retrieval": {"tasks": ["needle_1", "copy"], "depths": [0.5], "samples": 2},
    "bigbench": {"limit": 5},
    "generation": {"prompts": 4, "prompt_tokens": 16, "new_tokens": 8},
    "efficiency": {"contexts": [64], "batches": [1, 2], "new_tokens": 4, "repeats": 1, "budget_gb": 0.5},
    "margins": {"heldout_cloze/acc": 0.05, "bigbench/acc*": 0.3},
}
QUESTIONS = [{"question": f"the model reads {i}", "choices": ["a line", "of text"], "answer": i % 2} for i in range(9)]


@pytest.fixture(scope="module")
def teacher_name(teacher_folder: Callable[..., str]) -> str:  # noqa: F811
    return teacher_folder()


@pytest.fixture(scope="module")
def saved(teacher_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that sees eight tokens only."""
    teacher, tokenizer = load_teacher(teacher_name)
    folder = tmp_path_factory.mktemp("run") / "student"
    edit_model(teacher, GateSWAConfig(window=8, gate="none"), init="copy").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(
    saved: Path, teacher_name: str, tiny_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> Callable[..., dict[str, Any]]:  # fmt: skip
    """`evaluate(name=..., **changes of the suite)` runs the command and returns results.json."""
    fake = SimpleNamespace(
        measure_efficiency=lambda models, **options: [{"models": list(models), **options}],
        largest_batch=lambda model, context, budget: {"context": context, "budget_bytes": budget, "batch": 7},
    )
    monkeypatch.setitem(sys.modules, "pl_attnedit.eval.efficiency", fake)  # has tests of its own
    for name, questions in {"questions": QUESTIONS, "more": QUESTIONS[:4]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))

    def run(out: str = "eval", **changes: Any) -> dict[str, Any]:
        suite = {key: value for key, value in {**SUITE, **changes}.items() if value is not None}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        options = ["--suite", tmp_path / "suite.yaml", "--text", tiny_corpus, "--out", tmp_path / out]
        bigbench = ["--bigbench", tmp_path / "questions.jsonl", tmp_path / "more.jsonl"]
        assert main([str(a) for a in ("eval", saved, "--teacher", teacher_name, *options, *bigbench)]) == 0
        return json.loads((tmp_path / out / "results.json").read_text())

    return run


def test_a_suite_from_the_command_line(
    evaluate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate()
    printed = capsys.readouterr().out
    assert "heldout_cloze" in printed
    assert found["suite"]["name"] == "small"
    tasks = {(row["task"], row["metric"]): row for row in found["tasks"]}
    assert {task for task, _ in tasks} == {
        *("heldout_perplexity", "heldout_cloze", "needle_1", "copy", "bigbench_questions", "bigbench_more", "bigbench"),
        "generation",
    }
    assert tasks["generation", "sampled_nll"]["n"] == 4
    assert tasks["generation", "path_kl"]["student"] > 0.001
    cloze = tasks["heldout_cloze", "acc"]
    assert cloze["margin"] == 0.05
    assert cloze["verdict"] in ("non-inferior", "inferior", "inconclusive")
    assert cloze["mde"] > 0
    assert tasks["heldout_cloze", "acc_norm"]["verdict"] is None
    assert tasks["bigbench_questions", "acc"]["n"] == 5
    for metric in ("acc", "acc_norm"):
        pooled, parts = tasks["bigbench", metric], [tasks[f"bigbench_{name}", metric] for name in ("questions", "more")]
        assert pooled["n"] == 9
        for model in ("teacher", "student"):
            assert pooled[model] == pytest.approx(sum(part["n"] * part[model] for part in parts) / 9)
        assert (pooled["margin"], pooled["p_holm"]) == (0.3, pooled["p_value"])
        assert pooled["verdict"] in ("non-inferior", "inferior", "inconclusive")
    assert re.search(r"bigbench +acc +9 ", printed)
    assert [(row["start"], row["end"], row["n"]) for row in found["by_position"]] == [(0, 64, 128), (64, 128, 128)]
    assert found["by_position"][0]["kl"] > 0.001
    assert found["fidelity"]["kl"] == pytest.approx(sum(row["kl"] for row in found["by_position"]) / 2)
    places = [(row["task"], row["context"], row["depth"], row["n"]) for row in found["retrieval"]]
    assert places == [("needle_1", 512, 0.5, 2), ("copy", 512, 0.5, 2)]
    options = {"contexts": [64], "batches": [1, 2], "new_tokens": 4, "repeats": 1}
    assert found["efficiency"] == [{"models": ["teacher", "student"], **options}]
    assert found["largest_batch"][1] == {"model": "student", "context": 64, "budget_bytes": 500_000_000, "batch": 7}
    assert len(found["samples"]) == 14

    again = evaluate()
    everything = [*("heldout_perplexity", "heldout_cloze", "bigbench_questions", "bigbench_more", "needle_1", "copy")]
    assert again["settings"]["from_cache"] == {"teacher": everything, "student": everything}
    assert {**again, "settings": None} == {**found, "settings": None}

    other = evaluate(text={**SUITE["text"], "cloze": 9}, bigbench=None)  # type: ignore[dict-item]
    assert other["settings"]["from_cache"]["student"] == ["heldout_perplexity", "needle_1", "copy"]
    assert other["suite"]["version"] != found["suite"]["version"]


@pytest.fixture
def conversion(tmp_path: Path) -> tuple[str, str]:
    """The URI of an MLflow store and the run of a conversion in it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return uri, log_fake_conversion(uri, tmp_path, "one", complete=False)


def test_fidelity_alone(
    saved: Path, teacher_name: str, tiny_corpus: str, tmp_path: Path, conversion: tuple[str, str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A suite without any task, from the command line to the report; in another dtype it is measured anew."""
    uri, run_id = conversion
    connect(f"sqlite:///{tmp_path}/m.db")
    (tmp_path / "suite.yaml").write_text("name: short\nmax_length: 64\nby_position: {sequences: 6, context: 64}\n")
    command = ["eval", str(saved), "--teacher", teacher_name, "--suite", str(tmp_path / "suite.yaml")]
    command += ["--text", tiny_corpus, "--out", str(tmp_path / "eval"), "--log-to", run_id, "--tracking-uri", uri]

    def run(*more: str) -> dict[str, Any]:
        assert main([*command, *more]) == 0
        return json.loads((tmp_path / "eval" / "results.json").read_text())

    found = run()
    whole, [row] = found["fidelity"], found["by_position"]
    assert found["tasks"] == found["samples"] == []
    assert whole["kl"] == pytest.approx(row["kl"])
    assert 0 < whole["kl_stderr"] < whole["kl"]
    assert (whole["sequences"], whole["tokens"]) == (6, 384)
    printed = capsys.readouterr().out
    assert re.search(r"KL to the teacher +all tokens +384 +– +[\d.]+ ± [\d.]+ ", printed)
    assert re.search(r"perplexity +all tokens +384 +\d+\.\d+ +\d+\.\d+ ", printed)
    [logged] = find_conversions([run_id], uri)[0].evaluations
    assert logged.data.metrics["eval/fidelity/kl"] == whole["kl"]
    for name in ("report.html", "report.md"):
        text = write_report([run_id], tmp_path / name, uri).read_text()
        assert "All positions: KL" in text

    files = len(list((tmp_path / "eval" / ".answers").iterdir()))
    assert run()["fidelity"] == whole
    assert len(list((tmp_path / "eval" / ".answers").iterdir())) == files
    coarse = run("--dtype", "bfloat16")
    assert coarse["settings"]["dtype"] == "bfloat16"
    assert coarse["fidelity"]["kl"] != whole["kl"]
    assert coarse["fidelity"]["kl"] == pytest.approx(whole["kl"], rel=0.2)


def test_what_is_missing_is_said_before_anything_runs(
    saved: Path, teacher_name: str, tiny_corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    command = ["eval", str(saved), "--teacher", teacher_name, "--text", tiny_corpus, "--out", str(tmp_path / "out")]
    cases = {
        ("--suite", "offline"): "--bigbench = None: suite offline needs",
        ("--suite", "paper"): "max_length = 4096: must be at most the teacher's context of 512",
        ("--suite", "quick", "--tasks", "x"): "--tasks = ['x']: is the suite's",
        ("--suite", "quick", "--seq-len", "64"): "--seq-len = 64: is the suite's",
        ("--suite", "fast"): "suite = 'fast': must be one of",
        ("--task-folder", "x"): "--task-folder = 'x': needs --tasks",
        ("--batch-size", "many"): "--batch-size = 'many': must be a number or auto",
        ("--seq-len", "2"): "max_length = 2: sequences must have at least",
        ("--suite", str(tmp_path / "suite.yaml")): "max_length = 2: sequences must have at least",
        ("--log-to", "zzz", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"): "--log-to = 'zzz': must be a run",
        (
            "--log-to",
            "zzz",
            "--tracking-uri",
            f"sqlite:///{tmp_path}/none.db",
        ): "none.db here; nothing has been tracked",
    }
    connect(f"sqlite:///{tmp_path}/m.db")
    (tmp_path / "suite.yaml").write_text("name: short\nmax_length: 2\ntext: {documents: 2, document_chars: 99}\n")
    for options, message in cases.items():
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    nothing = ["eval", "none", "--teacher", "none", "--log-to", "zzz", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    assert main(nothing) == 2
    assert "--log-to = 'zzz'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Writes the trained teachers' token ids as words."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", bos_token="w0")


@pytest.fixture(scope="module")
def language(make_text: Callable[..., torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 texts in the language that the trained teachers know, and questions for the last word of each."""
    folder = tmp_path_factory.mktemp("language")
    rng = random.Random(0)

    def written(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    rows = []
    for ids in make_text(300, 20, seed=77).tolist():
        others = rng.sample([i for i in range(32) if i != ids[-1]], 7)
        choices = [f"w{i}" for i in (ids[-1], *others)]
        rows.append({"context": written(ids[:-1]), "choices": choices, "answer": 0, "text": written(ids)})
    acc = [{"metric": "acc"}]
    choice = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_target": "answer"}
    write_task(folder, "ending", rows, **choice, doc_to_choice="choices", metric_list=acc)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, "bits", rows, **rolling, metric_list=[{"metric": "bits_per_byte"}])
    return folder


@pytest.mark.parametrize("layer", [0, 1])
def test_half_a_layers_attention_is_found(
    layer: int, trained_llama: PreTrainedModel, words: PreTrainedTokenizerFast, language: Path
) -> None:
    damaged = copy.deepcopy(trained_llama)
    with torch.no_grad():
        damaged.model.layers[layer].self_attn.o_proj.weight.mul_(0.5)
    found = evaluate_pair(trained_llama, damaged, words, ["ending", "bits"], task_folder=language, max_length=32)
    ending, bits = found.tasks
    assert ending.teacher > 0.8
    assert bits.ci_low > 0
    assert bits.p_holm < 0.01
    # 300 right or wrong answers can tell less, and say so
    assert ending.difference < 0
    assert ending.mde is not None
    assert abs(ending.difference) < ending.mde


def test_a_model_beside_itself_is_never_worse(
    trained_llama: PreTrainedModel, words: PreTrainedTokenizerFast, language: Path
) -> None:
    twin = copy.deepcopy(trained_llama)
    found = evaluate_pair(trained_llama, twin, words, ["ending", "bits"], task_folder=language, max_length=32)
    for row in found.tasks:
        assert (row.difference, row.p_value, row.p_holm) == (0, 1, 1)
        assert row.ci_low <= 0 <= row.ci_high


@pytest.mark.slow
def test_lm_evals_command_line_finds_the_same(
    evaluate: Callable[..., dict[str, Any]], saved: Path, tmp_path: Path
) -> None:
    found = evaluate(efficiency=None)
    tasks = ["heldout_cloze", "bigbench_questions", "bigbench_more", "needle_1", "copy", "heldout_perplexity"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--include_path", str(tmp_path / "eval" / "tasks")]
    command += ["--model_args", f"pretrained={saved},trust_remote_code=True", "--tasks", ",".join(tasks)]
    command += ["--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "theirs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for row in found["tasks"]:
        if row["task"] == "bigbench":  # theirs has no such row
            continue
        value = theirs[row["task"]][f"{row['metric']},none"]
        assert row["student"] == (
            value if row["metric"].startswith(("acc", "exact")) else pytest.approx(value, rel=1e-4)
        )
