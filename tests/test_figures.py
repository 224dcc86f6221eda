"""The tables and plots of README and docs are what `make figures` makes of results/."""

from __future__ import annotations

import pytest

from results import figures


def test_tables_and_plots_are_the_datas() -> None:
    assert {path.name for path, text in figures.made().items() if path.read_text("utf-8") != text} == set()


def test_every_table_has_a_place() -> None:
    pages = [path.read_text("utf-8") for path in figures.pages()]
    assert {found[2].split()[0] for page in pages for found in figures.MARKED.finditer(page)} == set(figures.TABLES)


@pytest.mark.parametrize("figure", ["| 0.919 |", "| 2.99 |"])
def test_a_changed_figure_is_made_right(figure: str) -> None:
    page = (figures.ROOT / "docs" / "results" / "init.md").read_text("utf-8")
    changed = page.replace(figure, "| 0.5 |")
    assert changed != page == figures.remade(changed)
