"""`pl-attnedit study`: variants as conversions, compared with intervals."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from forked_runs import Forked, ForkedPopen
from mlflow.tracking import MlflowClient

from pl_attnedit.cli import main
from pl_attnedit.conversion import study_run
from pl_attnedit.conversion.checks import check_recipe
from pl_attnedit.conversion.recipe import read_recipe, recipe_parser
from pl_attnedit.conversion.study import read_study
from pl_attnedit.conversion.study_results import rows
from pl_attnedit.conversion.study_run import StudyRun
from pl_attnedit.errors import UserError
from pl_attnedit.locks import LOCK, claim
from pl_attnedit.shapes import config_of

Make = Callable[..., Any]
STUDIES = sorted(Path(__file__).parents[2].glob("configs/studies/*.yaml"))
NO_TEXT = {"documents": 2, "cloze": 2, "continuation_tokens": 0}


@pytest.fixture
def study(tmp_path: Path, recipe: Make) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        path = tmp_path / "study.yaml"
        small = {"stage1": {"steps": 1, "accumulate": 1}, "stage2": {"steps": 2}, "evaluation": NO_TEXT}
        content = {"name": "tiny_study", "base": recipe().name, "change": small, "variants": {"as it is": None}}
        path.write_text(yaml.safe_dump(content | fields, sort_keys=False))
        return path

    return write


def test_variants_run_fail_are_stopped_and_compared(
    study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "as it is": {},
        "broken": {"data": {"source": "missing.txt"}},
        "no stage 1": {"stage1": {"steps": 0}},
        "endless": {"stage1": {"steps": 100000}},
    }
    path, folder = study(variants=variants), tmp_path / "runs" / "tiny_study"
    monkeypatch.setattr(study_run, "subprocess", SimpleNamespace(Popen=ForkedPopen))
    process = Forked(tmp_path)
    process.run("study", path, "--workers", "2")
    finished, log = folder / "no_stage_1-0" / "report.html", folder / "endless-0.log"
    process.wait_for(lambda: finished.exists() and log.exists() and "stage1  step" in log.read_text())
    process.send(signal.SIGTERM)
    status, errors = process.end(), process.output()
    assert status == 128 + signal.SIGTERM, errors
    assert "broken-0: failed" in errors
    assert "missing.txt" in errors
    assert "endless-0: stopped" in errors
    assert list((folder / "endless-0" / "stage1").glob("*.ckpt"))  # its conversion has ended in order

    done = StudyRun(read_study(path), tmp_path / "runs", only=["it is", "stage 1"])
    elsewhere = claim(folder / "as_it_is-0" / LOCK)  # as of a process that was started by a study that is dead
    assert elsewhere is not None
    threading.Timer(1.0, elsewhere.close).start()
    assert done.run() == []  # nothing is started again, or beside it
    errors = capsys.readouterr().err
    assert errors.count("done before") == 2
    assert "as_it_is-0: another process runs it, waits for that" in errors
    for again in range(2):  # of another recipe than what is there: said, not taken for done, nor the second time
        changed = StudyRun(read_study(path), tmp_path / "runs", ["--stage2.steps", "7"], only=["it is"])
        assert changed.run() == ["as it is, seed 0"], again
        assert "another recipe" in capsys.readouterr().err
        assert changed.results()["rows"] == []
        assert "as_it_is-0: left out, holds another recipe (stage2 differ)" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(path), "--no-run", "--only", "it is", "-o", "study.json"]) == 0  # compares all
    first, without = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert (first["variant"], first["seeds"], without["variant"]) == ("as it is", [0], "no stage 1")
    assert (first["tokens_stage1"], without["tokens_stage1"]) == (64, 0)
    assert without["kl_after_stage1"] == without["kl_before"] != without["kl_after_stage2"]
    assert without["ratio"] == pytest.approx(without["kl_after_stage2"] / first["kl_after_stage2"])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "tiny_study"]
    kinds = [run.data.tags["pl_attnedit.kind"] for run in client.search_runs([experiment.experiment_id])]
    assert kinds.count("conversion") == 3


def test_ratios_cover_the_truth() -> None:
    """Variants whose true ratio is 0.8 beside a noise of 5%: the interval has it in 95% of all studies."""
    rng, inside, draws = np.random.default_rng(0), 0, 4000

    def summaries(level: float, seeds: int) -> list[dict[str, Any]]:
        kept = dict.fromkeys(("kl_before", "kl_after_stage1", "top1_after", "wall_seconds"), 1.0)
        kept |= dict.fromkeys(("tokens_stage1", "tokens_stage2"), 1)
        kept |= {"kv_budget": 0.5}
        return [{"seed": i, "kl_after_stage2": level * np.exp(0.05 * rng.normal()), **kept} for i in range(seeds)]

    for _ in range(draws):
        found = rows({"first": summaries(0.1, 2), "other": summaries(0.08, 1), "third": summaries(0.2, 3)}, "first")
        inside += found[1]["ratio_low"] < 0.8 < found[1]["ratio_high"]
    assert abs(inside / draws - 0.95) < 0.012
    alone = rows({"first": summaries(0.1, 1), "other": summaries(0.1, 1)}, "first")
    assert alone[1]["ratio_low"] is None
    without = rows({"other": summaries(0.1, 1), "third": summaries(0.1, 2)}, "first")
    assert [row["ratio"] for row in without] == [None, None]  # not to whatever happens to be there
    none = rows({"first": summaries(0.1, 2), "equal": summaries(0.0, 2), "other": summaries(0.1, 1)}, "first")
    assert none[1]["ratio"] is None
    assert none[2]["ratio_low"] > 0


def test_a_seed_that_diverged_leaves_the_intervals_of_the_others() -> None:
    def summaries(*kls: float) -> list[dict[str, Any]]:
        kept = dict.fromkeys(("kl_before", "kl_after_stage1", "top1_after", "wall_seconds", "tokens_stage1"), 1.0)
        kept |= {"tokens_stage2": 1, "kv_budget": 0.5}
        return [{"seed": seed, "kl_after_stage2": kl, **kept} for seed, kl in enumerate(kls)]

    found = {"first": summaries(0.1, 0.11), "other": summaries(0.08, 0.079)}
    alone = rows(found, "first")[1]
    for kls in ((0.2, math.nan), (math.nan, 0.2), (0.2, math.inf)):
        again = rows({**found, "diverged": summaries(*kls)}, "first")
        assert again[1]["ratio_low"] == alone["ratio_low"]
        assert again[2]["ratio"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "nowhere.yaml"}, "nowhere.yaml': cannot be read"),
        ({"variants": {}}, "must map names"),
        ({"variants": {"a": 3}}, "must map names"),
        ({"variants": ["a"]}, r"variants = \['a'\]: must map names"),
        ({"variants": {"a": {"seed": 7}}}, "a = 'seed': is the study's to set"),
        ({"change": {"name": "x"}}, "change = 'name': is the study's to set"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"sedes": [1]}, "known are name"),
        ({"name": None}, "must be a name"),
        ({"name": ""}, "must be a name"),
        ({"base": 123}, "123': cannot be read"),
        ({"name": ".."}, "must be a name"),
        ({"variants": {"a b": {}, "a_b": {}}}, "variants = 'a b': would be the same run as 'a_b'"),
        ({"change": 3}, "change = 3: must be fields"),
        ({"seeds": [0, "x"]}, "must be a list of different numbers"),
    ],
)
def test_mistakes(study: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_study(study(**fields))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_ours_fits_its_teacher(path: Path, tmp_path: Path) -> None:
    """Every variant is a recipe without mistakes. None has another's run folder or settings."""
    config_of("smollm2-135m").save_pretrained(tmp_path)
    parser, names, settings = recipe_parser(), [], []
    study = read_study(path)
    for _, _, fields in study.recipes():
        settings.append({**fields, "name": ""})
        fields["teacher"] = str(tmp_path)
        recipe, _ = read_recipe(parser, parser.parse_object(fields))
        check_recipe(recipe)
        names.append(recipe.name)
    assert len(set(names)) == len(names) >= len(study.variants)
    assert all(one != other for i, one in enumerate(settings) for other in settings[:i])


def test_mistakes_of_the_command(study: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert main(["study", str(study()), "--only", "nothing"]) == 2
    assert main(["study", str(study()), "--workers", "0"]) == 2
    (tmp_path / "empty.yaml").write_text("")
    assert main(["study", str(study(base="empty.yaml"))]) == 2
    assert main(["study", str(study(variants={"fine": {}, "odd": {"targets": 3}})), "--runs", str(tmp_path)]) == 2
    odd = {"stage2": {"steps": 2, "options": {"train": "bogus"}}}
    assert main(["study", str(study(variants={"fine": {}, "other": odd})), "--runs", str(tmp_path)]) == 2
    windowless = {"targets": {"S": {"type": "gate_swa", "window": 0}}}
    assert main(["study", str(study(variants={"fine": {}, "third": windowless})), "--runs", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    for taken in (["--seed", "3"], ["--name", "same"], ["--runs", "elsewhere"], ["--dry-run"], ["--experiment", "e"]):
        assert main(["study", str(study()), "--runs", str(tmp_path), "--", *taken]) == 2
        assert f"options after --: {taken[0].strip('-').replace('-', '_')} cannot" in capsys.readouterr().err, taken
    assert not list(tmp_path.glob("**/*.log"))  # nothing has begun
    (tmp_path / "latin.yaml").write_bytes("name: ü".encode("latin-1"))
    assert main(["study", str(tmp_path / "latin.yaml")]) == 2
    assert main(["study", str(study()), "--no-run", "--runs", str(tmp_path)]) == 2
    errors += capsys.readouterr().err
    assert all(text in errors for text in ("cannot be read", "part of one of: as it is", "--workers", "none of its"))
    assert all(text in errors for text in ("is empty, must be a recipe", "variant 'odd': "))
    assert all(
        text in errors for text in ("variant 'other': stage2.options.train = 'bogus'", "variant 'third': window = 0")
    )
