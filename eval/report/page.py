"""A report about conversions: what they cost, what they gained, how the training went.

As one self-contained HTML page, as Markdown for a pull request, or its numbers as JSON. Everything comes from MLflow;
what is not there is said to be missing. The page needs no network, and its script only adds to it. Texts from runs,
models and prompts are escaped by the template engine, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pl_attnedit.errors import invalid
from pl_attnedit.eval.records import find_conversions, find_fits
from pl_attnedit.eval.report.as_json import json_report
from pl_attnedit.eval.report.as_markdown import MAX_DETAILS, markdown_report
from pl_attnedit.eval.report.data import ConversionData, Evaluation, load_all, run_address
from pl_attnedit.eval.report.figures import efficiency_figures, overview_figures, position_figures, training_figures
from pl_attnedit.eval.report.formatting import FILTERS
from pl_attnedit.eval.report.tables import (
    ALPHA,
    EFFICIENCY_HEAD,
    SIGNS_READ,
    decode_gain,
    efficiency_table,
    fidelity_columns,
    fidelity_summary,
    fidelity_text,
    largest_batches,
    retrieval_grids,
    settings_text,
    task_row,
    verdict_counts,
)
from pl_attnedit.files import check_output, write_atomically
from pl_attnedit.tracking import connect
from pl_attnedit.tracking.client import EXPERIMENT, resolve_tracking_uri

FOLDER = Path(__file__).parent
TEMPLATE, STYLES, SCRIPT = "page.html", ("chart.css", "style.css"), "script.js"
PARTS = {"tasks": "tasks", "by_position": "agreement by position", "retrieval": "retrieval", "efficiency": "speed"}


def write_report(
    runs: Sequence[str] | str | None,
    out_path: str | Path,
    tracking_uri: str | None = None,
    experiment: str = EXPERIMENT,
) -> Path:
    """Write the report about conversions (run ids, a search filter, or None for all) to `out_path`.

    Among all are trainings outside of a conversion that have been evaluated.

    The suffix says what is written: ``.html`` the page, ``.md`` Markdown for a pull request, ``.json`` the numbers
    (`json_report`). The file is replaced in one step.

    Raises:
        UserError: MLflow cannot be reached, no such run or experiment, or another suffix.
    """
    formats = {".html": _html, ".md": markdown_report, ".json": json_report}
    suffix = Path(out_path).suffix.lower()
    if suffix not in formats:
        raise invalid("out_path", str(out_path), f"must end in {' or '.join(formats)}")
    check_output("out_path", out_path)
    conversions = find_conversions(runs, tracking_uri, experiment)
    if runs is None:
        conversions += [fit for fit in find_fits(tracking_uri, experiment) if fit.evaluations]
    data = load_all(connect(tracking_uri), conversions)
    address = partial(run_address, resolve_tracking_uri(tracking_uri))
    text = formats[suffix](data, datetime.now(timezone.utc), address)
    # A lone surrogate in a foreign text has no place in UTF-8.
    return write_atomically(out_path, text.encode("utf-8", "replace").decode("utf-8"))


def _html(data: Sequence[ConversionData], made: datetime, address: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    measured = {name for conversion in data for name in PARTS if conversion.part(name)}
    *styles, script = ((FOLDER / name).read_text(encoding="utf-8") for name in (*STYLES, SCRIPT))
    style = "".join(styles)
    return environment.get_template(TEMPLATE).render(
        made=made,
        overview=overview_figures(data),
        fidelity=fidelity_columns(data),
        parts=[_part(conversion, measured, detailed=i < MAX_DETAILS) for i, conversion in enumerate(data)],
        measured=measured,
        efficiency_head=EFFICIENCY_HEAD,
        alpha=ALPHA,
        signs_read=SIGNS_READ,
        address=address,
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
    )


def _hash(text: str) -> Markup:
    """A source of the content security policy: what has this content may run, nothing else."""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


def _part(data: ConversionData, measured: set[str], detailed: bool) -> dict[str, Any]:
    """A conversion's row of the overview and, if `detailed`, its section of the page."""
    return {
        "data": data,
        "detailed": detailed,
        "training": training_figures(data) if detailed else [],
        "evaluations": [_evaluation(evaluation) for evaluation in data.evaluations] if detailed else [],
        "verdicts": verdict_counts(data),
        "fidelity": fidelity_summary(data),
        "gain": decode_gain(data.part("efficiency")),
        "unmeasured": [text for name, text in PARTS.items() if name in measured and not data.part(name)],
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    runs = [evaluation.run] if evaluation.run else []
    tasks = [task_row(row) for row in evaluation.part("tasks")]
    positions, efficiency = evaluation.positions, evaluation.part("efficiency")
    return {
        "suite": evaluation.suite,
        "version": evaluation.version,
        "checkpoint": evaluation.checkpoint,
        "run": evaluation.run,
        "failed": evaluation.failed,
        "error": evaluation.error if evaluation.failed else "",
        "has_results": evaluation.results is not None,
        "settings": settings_text((evaluation.results or {}).get("settings") or {}),
        "tasks": tasks,
        "figures": [
            *(position_figures(positions, runs) if positions else []),
            *(efficiency_figures(efficiency, runs) if efficiency else []),
        ],
        "fidelity": fidelity_text(evaluation.fidelity),
        "efficiency": efficiency_table(efficiency),
        "batches": largest_batches(evaluation.part("largest_batch")),
        "grids": retrieval_grids(evaluation.part("retrieval")),
    }
