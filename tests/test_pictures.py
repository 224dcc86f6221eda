"""The plots of README and docs are what `make figures` makes of results/."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_plots_are_the_datas() -> None:
    plots = runpy.run_path(str(ROOT / "results" / "pictures.py"))["PLOTS"]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    for name, made in plots.items():
        svg = made()
        assert ET.fromstring(svg).tag.endswith("svg")
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text("utf-8") == svg
        assert f"pictures/{name}.svg" in text
