"""Pictures of Vega-Lite, without a browser: vl-convert brings Vega along, and a specification becomes SVG for the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import vl_convert
from markupsafe import Markup

from pl_attnedit.eval.report.scales import Axis

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 32, 46  # room around the axes
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

# `chart.css` sets the letters' sizes; these are for whatever reads no styles, and to see which labels have room.
LETTERS = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelPadding": 5}
COLOURS = {"domain": "gray", "tick": "gray", "grid": "grid", "label": "soft", "title": "soft"}
CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "titleBaseline": "alphabetic",
        **LETTERS,
        **{f"{part}Color": f"var(--{name})" for part, name in COLOURS.items()},
    },
    "axisX": {"grid": False, "tickSize": 4, "titleY": 39, "labelFlush": False}
    | {"labelOverlap": "greedy", "labelSeparation": 10},
    "axisY": {
        "domain": False,
        "ticks": False,
        "titleAngle": 0,
        "titleAlign": "left",
        "titleX": 2 - LEFT,
        "titleY": -17,
    },
}

Row = dict[str, Any]  # of data, or a part of a specification


def axis_of(axis: Axis, field: str) -> Row:
    """The encoding of a field by an axis."""
    scale = {"type": "log" if axis.log else "linear", "domain": [axis.low, axis.high], "nice": False, "zero": False}
    labels = f"{json.dumps(axis.labels)}[round(datum.index * {len(axis.labels) - 1})]"
    ticks = {"values": [*axis.ticks], "labelExpr": labels}
    return {"field": field, "type": "quantitative", "title": axis.title, "scale": scale, "axis": ticks}


def layer_of(mark: str, rows: Sequence[Row], encoding: Row, **style: Any) -> Row:
    """Marks of one kind."""
    return {"data": {"values": [*rows]}, "mark": {"type": mark, **style}, "encoding": encoding}


def draw(layers: Sequence[Row], width: int, height: int, description: str) -> Markup:
    """The layers on `width` x `height` pixels between the axes, as a picture of `WIDTH`."""
    room = {"left": LEFT, "right": WIDTH - LEFT - width, "top": TOP, "bottom": BOTTOM}
    size = {"width": width, "height": height, "padding": room, "autosize": "none"}
    spec = json.dumps({"$schema": SCHEMA, **size, "config": CONFIG, "layer": layers}, ensure_ascii=False)
    # A lone surrogate in a foreign name has no place in UTF-8.
    drawing = Markup(_svg(spec.encode("utf-8", "replace").decode()))
    box = f"0 0 {WIDTH} {TOP + height + BOTTOM}"
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}').format(box, description, drawing)


@lru_cache(maxsize=256)  # a report that is written again and again has most of its charts again
def _svg(spec: str) -> str:
    """Vega's picture without its first tag."""
    return re.sub(r"<[^<>]*>", _tidy, vl_convert.vegalite_to_svg(spec)).split(">", 1)[1]


def _tidy(tag: re.Match[str]) -> str:
    """A tag of Vega without what the page has no use for; what a mark's description says becomes its tooltip."""
    if re.match(r'<path class="(background|foreground)"', tag[0]):
        return ""
    text = re.sub(r' (role|aria-hidden|aria-roledescription|pointer-events|font-family)="[^"]*"', "", tag[0])
    before, label, after = ([*re.split(r' aria-label="([^"]*)"', text, maxsplit=1), "", ""])[:3]
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", before + after)
    return text if not label else f"{text.removesuffix('/>')}><title>{label}</title></path>"
