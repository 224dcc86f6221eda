"""Suites are YAML; their version changes with what they measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness import suites
from pl_attnedit.eval.harness.differences import margin_of
from pl_attnedit.eval.harness.suites import SUITES, load_suite


@pytest.mark.parametrize("name", ["quick", "fidelity", "offline", "paper"])
def test_our_suites_load(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite == load_suite(str(SUITES / f"{name}.yaml"))
    assert bool(suite.margins) == (name != "fidelity"), "which has no tasks"
    assert bool(suite.library) == (name == "paper"), "only that one needs the hub"


def test_the_version_is_of_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick = load_suite("quick")
    copied = tmp_path / "mine.yaml"
    copied.write_text("# another comment\n" + (SUITES / "quick.yaml").read_text())
    assert load_suite(str(copied)).version == quick.version
    assert quick.retrieval
    assert replace(quick, retrieval=replace(quick.retrieval, samples=2)).version != quick.version
    assert replace(quick, margins=dict(reversed(quick.margins.items()))).version == quick.version
    assert replace(quick, margins={}).version != quick.version
    before = quick.version
    monkeypatch.setattr(suites, "TASKS_VERSION", 10**6)
    assert quick.version != before


def test_the_pooled_row_has_a_margin_of_its_own() -> None:
    margins = load_suite("offline").margins
    for stated in (margins, dict(reversed(margins.items()))):
        found = [margin_of(name, stated) for name in ("bigbench/acc", "bigbench/acc_norm", "bigbench_snarks/acc")]
        assert found == [0.03, 0.03, 0.01]
    assert margin_of("bigbench/f1", margins) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name: x\nretrival: {samples: 1}",
            r"suite.retrival.samples: there is no such field; docs/add/suite.md lists them",
        ),
        ("name: x\ntext: {documents: many}", "documents: must be of type int, not many"),
        ("name: x\nretrieval: {depth: [0.5]}", "Option 'depth' is not accepted"),
        ("name: x\nretrieval: {tasks: [kopy]}", "retrieval.tasks = 'kopy': must be one of needle_1, needle_4"),
        ("name: x\nretrieval: {samples: 0}", "suite x: retrieval.samples = 0: must be at least 1"),
        ("name: x\nmargins: {a/acc: -1}", "suite x: margins = 'a/acc: -1.0': must be positive"),
        ("max_length: 64", "required: suite.name"),
    ],
)
def test_mistakes(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_suite(str(path))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="suite = 'quik': must be one of fidelity, fidelity_2k, offline, paper, quick"):
        load_suite("quik")
