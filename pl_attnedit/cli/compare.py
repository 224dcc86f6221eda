"""`pl-attnedit compare`: conversions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from pl_attnedit.cli.options import OptionParser, chosen_runs, json_option, runs_options
from pl_attnedit.errors import invalid
from pl_attnedit.files import check_output, write_atomically


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="pl-attnedit compare", description="Conversions in MLflow side by side.")
    runs_options(parser)
    parser.add_argument("--format", choices=["text", "markdown", "csv", "json"], help="default: by the ending of FILE")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=expanduser,
        help="write the table there (.md, .csv, .json, .txt) instead of printing",
    )
    json_option(parser)
    options = parser.parse_args(list(arguments))
    if options.json:
        options.format = "json"
    runs = chosen_runs(options)
    endings = {".md": "markdown", ".csv": "csv", ".json": "json", ".txt": "text"}
    style = options.format or "text"
    if options.out is not None:
        check_output("--out", options.out)
        style = options.format or endings.get(Path(options.out).suffix.lower())
        if style is None:
            raise invalid("--out", options.out, f"must end in {' or '.join(endings)}, or needs --format")
    from pl_attnedit.eval.report.compare import compare_runs, format_rows

    rows = compare_runs(runs, options.tracking_uri, options.experiment)
    if options.out:
        print(write_atomically(options.out, format_rows(rows, style)))
    else:
        print(format_rows(rows, style), end="")
    return 0
