"""`pl-attnedit convert` as a user runs it: end to end, again, killed, interrupted."""

from __future__ import annotations

import gc
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Forked
from mlflow.tracking import MlflowClient
from transformers import PreTrainedModel

import pl_attnedit
from pl_attnedit.cli import main
from pl_attnedit.conversion import pipeline
from pl_attnedit.conversion.dry_run import dry_run
from pl_attnedit.conversion.pipeline import Conversion
from pl_attnedit.conversion.recipe import as_plain, read_recipe, recipe_parser
from pl_attnedit.conversion.run_folder import RunFolder, read_summary
from pl_attnedit.data import TextDataModule
from pl_attnedit.errors import UserError
from pl_attnedit.files import json_text
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint

KEYS = (
    "teacher targets pattern phases tokens_stage1 tokens_stage2 tokens_per_s_stage1 tokens_per_s_stage2 kl_before "
    "kl_after_stage1 kl_after_stage2 top1_after ppl_teacher ppl_student kv_budget kv_context kv_bytes_per_token_teacher "
    "kv_bytes_per_token_student wall_seconds peak_rss_bytes run_id recipe"
)
Make = Callable[..., Any]


def content(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_from_a_recipe_to_a_report_and_again(
    recipe: Make, start: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    output, errors = (process := start("convert", "-c", path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    folder = tmp_path / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == set(KEYS.split())
    assert (summary["tokens_stage1"], summary["tokens_stage2"]) == (4 * 2 * 32 * 2, 3 * 2 * 32)
    assert summary["pattern"] == "SSSF"
    assert budget(summary) == expected_budget(path, summary)
    assert all(summary[f"kl_{when}"] > 0 for when in ("before", "after_stage1", "after_stage2"))
    assert 0 < summary["wall_seconds"] < 120
    assert "KL(teacher||student)" in output
    assert "<html" in (folder / "report.html").read_text()
    noise = [line for line in errors.splitlines() if not line.startswith(("== ", "init ", "stage1 ", "stage2 "))]
    noise = [line for line in noise if line.strip() and "the documents give only" not in line and "tok/s" not in line]
    assert noise == []
    assert all(name in errors for name in ("== init", "init  validating", "stage1  step 4/4", "stage2  step 3/3"))

    student = pl_attnedit.load(folder / "student")
    assert student(torch.ones(1, 20, dtype=torch.long)).logits.shape == (1, 20, 300)

    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "pl_attnedit"]
    runs = {run.data.tags["pl_attnedit.kind"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"conversion", "stage1", "stage2", "evaluation"}
    parent = runs.pop("conversion")
    assert parent.info.run_id == summary["run_id"]
    assert parent.data.metrics["kl_after_stage2"] == summary["kl_after_stage2"]
    where = {
        tag: parent.data.tags[f"pl_attnedit.{tag}"] for tag in ("student", "student_fingerprint", "working_folder")
    }
    assert where == {
        "student": str(folder / "student"),
        "student_fingerprint": model_fingerprint(folder / "student"),
        "working_folder": str(tmp_path),
    }
    assert runs["stage2"].data.tags["pl_attnedit.checkpoints"] == str(folder / "stage2")
    for run in (parent, *runs.values()):
        assert run.info.status == "FINISHED"
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    check_datasets_and_source({"conversion": parent, **runs}, parsed(path).data["source"])
    assert runs["stage1"].data.metrics["val/kl"] == pytest.approx(summary["kl_after_stage1"], rel=1e-5)

    check_parent_and_model(parent, summary, client)

    before = content(tmp_path)
    assert main(["convert", "-c", str(path)]) == 0
    assert "done before" in capsys.readouterr().err
    assert content(tmp_path) == before

    assert main(["convert", "-c", str(path), "--stage1.steps", "5"]) == 2
    assert "another recipe (stage1 differ)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(TextDataModule, "fingerprint", "of another text")
        assert main(["convert", "-c", str(path)]) == 2
    assert "was begun with another text" in capsys.readouterr().err
    (folder / "student").rename(folder / "elsewhere")
    assert main(["convert", "-c", str(path)]) == 2
    assert "student: is gone" in capsys.readouterr().err
    (folder / "elsewhere").rename(folder / "student")
    assert content(tmp_path) == before

    model = str(folder / "student")
    assert main(["generate", model, "the model", "--max-new-tokens", "3"]) == 0
    assert main(["generate", model, "the model", "--max-new-tokens", "3", "--temperature", "0.7"]) == 0
    for mistake, message in (
        (["", "--max-new-tokens", "3"], "has no token to go on from"),
        (["x", "--chat"], "has no chat template"),
        (["x", "--temperature", "nan"], "--temperature = nan: must be at least 0"),
    ):
        assert main(["generate", model, *mistake]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", "-c", str(path), "--register", "tiny-swa"]) == 0  # of a conversion that is done
    assert "registered as tiny-swa" in capsys.readouterr().err
    [version] = client.search_model_versions("name = 'tiny-swa'")
    assert version.run_id == parent.info.run_id
    assert model in version.description
    assert main(["compare"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["report", "-o", "all.html"]) == 0
    assert "tiny" in (tmp_path / "all.html").read_text()
    assert main(["report", "-o", "all.json"]) == 0
    [exported] = json.loads((tmp_path / "all.json").read_text())
    curves = {(curve["stage"], curve["metric"]): curve for curve in exported["curves"]}
    assert [curves["stage1", "val/kl"]["steps"][i] for i in (0, -1)] == [0, 4]
    assert curves["stage1", "val/kl"]["values"][0] == pytest.approx(summary["kl_before"], rel=1e-5)
    assert curves["stage2", "val/kl"]["values"][-1] == pytest.approx(summary["kl_after_stage2"], rel=1e-5)
    data = parsed(path).data
    options = ["--text", data["source"], "--seq-len", "32", "--documents", "2", "--cloze", "2", "--out", "again"]
    log = ["--log-to", summary["run_id"]]
    assert main(["eval", model, "--teacher", summary["teacher"], *options, *log]) == 0
    assert "heldout_cloze" in capsys.readouterr().out
    assert (tmp_path / "again" / "results.json").is_file()
    kinds = [run.data.tags["pl_attnedit.kind"] for run in client.search_runs([experiment.experiment_id])]
    assert kinds.count("evaluation") == 2
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    [again, first] = client.search_runs([experiment.experiment_id], "tags.`pl_attnedit.kind` = 'evaluation'")
    [dataset] = [each.dataset for each in again.inputs.dataset_inputs]
    assert dataset.digest == results["settings"]["text_digest"] == first.inputs.dataset_inputs[0].dataset.digest
    perplexity = "heldout_perplexity/word_perplexity/difference"
    values = [metric.value for metric in client.get_metric_history(parent.info.run_id, perplexity)]
    assert values == [first.data.metrics[f"eval/{perplexity}"], again.data.metrics[f"eval/{perplexity}"]]


def check_datasets_and_source(runs: dict[str, Any], source: str) -> None:
    """What the columns Dataset and Source of MLflow's table show."""
    used = {
        kind: {(each.tags[0].value, each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
        for kind, run in runs.items()
    }
    assert {context for context, _, _ in used["conversion"]} == {"training", "validation"}
    assert used["conversion"] == used["stage1"] == used["stage2"]
    [(context, name, digest)] = used["evaluation"]
    assert (context, name) == ("evaluation", source)
    assert ("validation", source, digest) in used["conversion"]
    for run in runs.values():
        assert run.data.tags["mlflow.source.name"] == "pl-attnedit convert"
        assert run.data.tags["mlflow.source.type"] == "LOCAL"


def check_parent_and_model(parent: Any, summary: dict[str, Any], client: MlflowClient) -> None:
    """What MLflow's tables and charts of parents compare, and the column Models."""
    differences = {
        f"{task}/{metric}/{name}"
        for task, metric in (("heldout_perplexity", "word_perplexity"), ("heldout_cloze", "acc"))
        for name in ("difference", "ci_low", "ci_high")
    }
    numbers = {name for name, value in summary.items() if isinstance(value, int | float)}
    assert set(parent.data.metrics) == numbers | differences
    assert parent.data.metrics["kv_budget"] == budget(summary)
    assert summary["tokens_per_s_stage1"] > 0
    [output] = parent.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.status, model.source_run_id) == ("tiny", "READY", parent.info.run_id)
    assert model.params["pattern"] == "SSSF"
    assert Path(model.params["folder"], "model.safetensors").stat().st_size == int(model.params["size_bytes"])
    assert {metric.key: metric.value for metric in model.metrics} == parent.data.metrics
    files = list(Path(model.artifact_location).iterdir())
    assert [file.name for file in files] == ["MLmodel"], "no weights"


def parsed(path: Path) -> Any:
    return recipe_parser().parse_args(["-c", str(path)])


def budget(summary: dict[str, Any]) -> float:
    return summary["kv_bytes_per_token_student"] / summary["kv_bytes_per_token_teacher"]


def expected_budget(path: Path, summary: dict[str, Any]) -> float:
    """That of the dry run, at the same context."""
    parser = recipe_parser()
    estimate, options = read_recipe(parser, parsed(path))
    rows = dry_run(estimate, TextDataModule(estimate.teacher, **options))["kv"]
    return next(row["budget"] for row in rows if row["context"] == summary["kv_context"])


def test_one_layer_of_a_mixture_with_a_trunk_of_another_dtype(
    recipe: Make, tiny_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of a shape; no phase leaves its models in memory, which has room for those of one."""
    monkeypatch.chdir(tmp_path)

    def models() -> set[int]:
        gc.collect()
        return {id(each) for each in gc.get_objects() if isinstance(each, PreTrainedModel)}

    before, left = models(), []
    monkeypatch.setattr(pipeline, "release_memory", lambda: left.append(models() - before))
    stage = {"steps": 1, "learning_rate": 1e-3}
    trainer = {"accelerator": "cpu", "precision": "bf16-mixed", "enable_progress_bar": False}
    path = recipe(
        teacher="shape:tiny-qwen3-moe",
        data={"source": tiny_corpus, "seq_len": 64, "batch_size": 2, "val_sequences": 5},
        pattern="FSFF",
        stage1=stage,
        stage2=stage,
        trainer=trainer,
        dtype="bfloat16",
    )
    assert main(["convert", "-c", str(path)]) == 0
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert len(left) >= 7
    assert not any(left)
    assert pl_attnedit.load(tmp_path / "runs" / "tiny" / "student").dtype == torch.bfloat16
    assert budget(summary) == expected_budget(path, summary)


def test_a_stage_left_out_has_no_figures_in_further_processes(recipe: Make) -> None:
    path = recipe()
    given, options = read_recipe(parser := recipe_parser(), parsed(path))
    plain = as_plain(parser, parsed(path))
    assert "phases" not in plain["stage1"], "as in run folders that were begun before there were phases"
    folder = RunFolder(path.parent / "runs" / "tiny", plain, follows=True)
    conversion = Conversion(given, TextDataModule(given.teacher, **options), folder, None, plain)
    assert conversion.leave_out("stage1", "init") == {}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data.seq_len", "8", "max_length = 8: sequences must have at least"),
        ("--data.val_sequences", "1", "documents = '1 texts': too short for 2 samples of heldout_perplexity"),
    ],
)
def test_what_is_too_short_for_the_tasks_is_refused_before_a_run_folder_exists(
    option: str,
    value: str,
    message: str,
    recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "-c", str(recipe()), option, value]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # no database either


def test_a_folder_has_one_process_and_one_purpose(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe()
    held = RunFolder(tmp_path / "runs" / "tiny", as_plain(recipe_parser(), parsed(path)))
    assert main(["convert", "-c", str(path)]) == 2
    assert "another process" in capsys.readouterr().err
    held._lock.close()
    used = tmp_path / "runs" / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    assert main(["convert", "-c", str(path), "--name", "used"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert {file.name for file in used.iterdir()} <= {"thesis.txt", ".lock"}
    (tmp_path / "file").write_text("")
    assert main(["convert", "-c", str(path), "--runs", "file"]) == 2
    assert "must be a folder that can be written to" in capsys.readouterr().err


@pytest.fixture
def slow_stages(recipe: Make, tmp_path: Path) -> Path:
    """A recipe whose stages save each step and wait a little at each step."""
    (tmp_path / "waiting.py").write_text(
        "import time\nfrom lightning.pytorch import Callback\n\n\n"
        "class Waiting(Callback):\n    def on_train_batch_end(self, *_):\n        time.sleep(0.1)\n"
    )
    each_step = {"class_path": "pl_attnedit.callbacks.ResumableCheckpoint", "init_args": {"every_seconds": 0}}
    stage = {"steps": 12, "learning_rate": 3e-3, "callbacks": ["waiting.Waiting", each_step]}
    phases = [{"seq_len": 32, "batch_size": 2, "steps": 5, "learning_rate": 3e-3}]
    phases.append({"seq_len": 64, "batch_size": 1, "steps": 7, "learning_rate": 1e-3})
    through = {"phases": phases, "callbacks": stage["callbacks"]}
    return recipe(stage1=stage, stage2=through, init="random")


def test_killed_and_interrupted_conversions_go_on_to_the_same_figures(
    slow_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "-c", str(slow_stages), "--runs", "unbroken"]) == 0
    folder = tmp_path / "runs" / "tiny"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    said = "after step {}; the same command goes on from " + str(folder.resolve())
    for stage, number in (("stage1", signal.SIGTERM), ("stage2", signal.SIGKILL), ("stage2", signal.SIGINT)):
        before = set((folder / stage).glob("last-*.ckpt"))
        process = Forked(tmp_path)
        process.run("convert", "-c", slow_stages)
        process.wait_for(lambda: set((folder / stage).glob("last-*.ckpt")) - before)  # noqa: B023
        process.send(number)
        status, errors = process.end(), process.output()
        assert not (folder / "summary.json").exists()
        assert stage not in json.loads((folder / "progress.json").read_text())
        assert status == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[number]
        if number != signal.SIGKILL:
            newest = max((folder / stage).glob("last-*.ckpt"))
            step = int(newest.stem.removeprefix("last-"))
            assert f"interrupted by {number.name} {said.format(step)}/{stage}/{newest.name}" in errors
            assert "Traceback" not in errors
            runs = json.loads((folder / "mlflow.json").read_text())
            statuses = [client.get_run(run).info.status for run in (runs["run_id"], runs["children"][stage])]
            assert statuses == ["KILLED", "KILLED"]
    capsys.readouterr()
    folder = folder.parent.rename(tmp_path / "moved") / "tiny"  # the tasks name their files absolutely
    assert main(["convert", "-c", str(slow_stages), "--runs", "moved"]) == 0
    errors = capsys.readouterr().err
    assert "stage1: done before" in errors
    assert "stage2: goes on from last-" in errors
    unbroken = json.loads((tmp_path / "unbroken" / "tiny" / "summary.json").read_text())
    found = json.loads((folder / "summary.json").read_text())
    for name in ("kl_before", "kl_after_stage1", "kl_after_stage2", "top1_after", "ppl_student"):
        assert found[name] == pytest.approx(unbroken[name], rel=0.02), name
    assert found["tokens_stage1"] == unbroken["tokens_stage1"] == 12 * 64
    steps = "stage 2: 5 steps of 2 × 32 tokens, 7 steps of 1 × 64 tokens"
    assert found["phases"] == unbroken["phases"] == steps
    assert f" tokens ({steps}). It" in (folder / "student" / "README.md").read_text()
    assert f"({steps})" in (folder / "report.html").read_text()
    assert found["tokens_stage2"] == unbroken["tokens_stage2"] == 5 * 2 * 32 + 7 * 64


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_broken_summary_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"its summary\.json is broken"):
        read_summary(tmp_path)


def test_a_summary_of_a_diverged_student_is_json_and_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json_text({"kl_before": 1.5, "kl_after_stage2": math.nan}))
    found = read_summary(tmp_path)
    assert found["kl_before"] == 1.5
    assert math.isnan(found["kl_after_stage2"])


def test_wall_time_counts_the_starts_that_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    clock = iter([now - 100, now + 1000, now + 1010, now + 1010])
    monkeypatch.setattr("pl_attnedit.conversion.run_folder.time.time", lambda: next(clock))
    first = RunFolder(tmp_path / "run", {"name": "x"})
    first.start()  # 100 s ago; its last sign of life is the file it writes now
    first._lock.close()
    second = RunFolder(tmp_path / "run", {"name": "x"})
    second.start()
    second.finish("stage1", {})
    assert second.progress["wall_seconds"] == pytest.approx(110, abs=5)


def test_a_broken_progress_file_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"name": "x"})._lock.close()
    (tmp_path / "run" / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress\.json is broken"):
        RunFolder(tmp_path / "run", {"name": "x"})
