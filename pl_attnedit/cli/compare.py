"""`pl-attnedit compare`: conversions side by side."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from pl_attnedit.eval.compare import compare_runs, format_rows


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="pl-attnedit compare", description="Conversions in MLflow side by side.")
    parser.add_argument("runs", nargs="*", help="run ids of conversions (default: all)")
    parser.add_argument("--filter", help="an MLflow search filter instead, e.g. \"tags.target = 'mla'\"")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv", "json"])
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    options = parser.parse_args(list(arguments))
    rows = compare_runs(options.runs or options.filter, options.tracking_uri)
    print(format_rows(rows, options.format))
    return 0
