"""The README's tables and the plots beside the data are what the data gives; `make figures` makes them again."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "results" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_datas(readme: ModuleType) -> None:
    text = readme.README.read_text("utf-8")
    assert readme.with_tables(text) == text
    changed = text.replace("| MLA 92+36 = 128 | 0.8", "| MLA 92+36 = 128 | 0.7")
    assert changed != text == readme.with_tables(changed)


def test_a_table_without_its_place_is_an_error(readme: ModuleType) -> None:
    text = readme.README.read_text("utf-8")
    with pytest.raises(ValueError, match="one table bench_trl, has 0"):
        readme.with_tables(text.replace("<!-- begin bench_trl -->", ""))


def test_plots_are_the_datas(readme: ModuleType) -> None:
    made = readme.plots()
    text = readme.README.read_text("utf-8")
    for path, svg in made.items():
        assert path.read_text("utf-8") == svg
        assert ET.fromstring(svg).tag.endswith("svg")
        assert f"results/{path.name}" in text
    assert set(ROOT.glob("results/*.svg")) == set(made)
