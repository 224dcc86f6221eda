"""The tables and plots of README and docs are what `make figures` makes of results/."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "results" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_datas(figures: ModuleType) -> None:
    made = {path: figures.remade(path.read_text("utf-8")) for path in figures.pages()}
    assert {path for path, text in made.items() if text != path.read_text("utf-8")} == set()
    shown = {found[2].split()[0] for text in made.values() for found in figures.MARKED.finditer(text)}
    assert shown == set(figures.TABLES)


def test_a_changed_figure_is_made_right(figures: ModuleType) -> None:
    page = (ROOT / "docs" / "results" / "init.md").read_text("utf-8")
    changed = page.replace("| 0.919 |", "| 0.819 |")
    assert changed != page == figures.remade(changed)
