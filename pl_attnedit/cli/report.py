"""`pl-attnedit report`: one HTML page about conversions."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from pl_attnedit.eval.report import write_report


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="pl-attnedit report", description="One self-contained HTML page about conversions.")
    parser.add_argument("runs", nargs="*", help="run ids of conversions (default: all)")
    parser.add_argument("--filter", help="an MLflow search filter instead, e.g. \"tags.target = 'mla'\"")
    parser.add_argument("-o", "--out", default="report.html", help="file to write (default report.html)")
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    options = parser.parse_args(list(arguments))
    print(write_report(options.runs or options.filter, options.out, options.tracking_uri))
    return 0
