"""The tables and plots of README.md and docs/, made from the data in results/: `make figures`.

A table stands between `<!-- table FUNCTION ARGUMENT; ... -->` and `<!-- end -->`: the page says which rows it shows. A plot
is docs/pictures/NAME.svg. tests/test_figures.py makes all of them again and compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from results.figures import plots, quality, speed, tasks
from results.figures.data import FOLDER

ROOT = FOLDER.parent
MADE: tuple[Callable[..., str], ...] = (
    quality.conversions,
    quality.recipes,
    quality.phases,
    quality.times,
    quality.quickstart,
    quality.study,
    quality.pilots,
    quality.bench_init,
    quality.bench_init_gemma,
    quality.sensitivity,
    quality.sequences,
    quality.windows,
    quality.precision,
    tasks.offline,
    tasks.by_context,
    tasks.phases_tasks,
    speed.bench_one_gpu,
    speed.bench_two_gpus,
    speed.bench_eval,
    speed.bench_trl,
    speed.bench_decode,
    speed.bench_cuda_graph,
    speed.serving_loads,
    speed.serving_alone,
    speed.serving_kl,
)
TABLES = {made.__name__: made for made in MADE}
PLOTS = (plots.kv_budget, plots.random_init)
MARKED = re.compile(r"(<!-- table (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def remade(page: str) -> str:
    """A page with its tables made again."""

    def one(match: re.Match[str]) -> str:
        name, _, arguments = match[2].partition(" ")
        return f"{match[1]}{TABLES[name](*filter(None, arguments.split('; ')))}\n{match[3]}"

    return MARKED.sub(one, page)


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def made() -> dict[Path, str]:
    """README, the pages of docs/ and the plots as they shall be."""
    tables = {path: remade(path.read_text("utf-8")) for path in pages()}
    return tables | {ROOT / "docs" / "pictures" / f"{plot.__name__}.svg": plot() for plot in PLOTS}
