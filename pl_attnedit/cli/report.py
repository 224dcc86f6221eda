"""`pl-attnedit report`: one HTML page about conversions, once or on a schedule with the evaluations that are missing."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Sequence

from pl_attnedit.errors import UserError, invalid

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="pl-attnedit report", description="One self-contained HTML page about conversions.")
    parser.add_argument("runs", nargs="*", help="run ids of conversions (default: all)")
    parser.add_argument("--filter", help="an MLflow search filter instead, e.g. \"tags.target = 'mla'\"")
    parser.add_argument("-o", "--out", default="report.html", help="file to write (default report.html)")
    parser.add_argument("--experiment", default="pl_attnedit", help="MLflow experiment (default pl_attnedit)")
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    schedule = parser.add_argument_group("schedule", "first evaluate students and checkpoints that --suite has not seen")
    rounds = schedule.add_mutually_exclusive_group()
    rounds.add_argument("--watch", action="store_true", help="again and again, until SIGTERM or Ctrl-C")
    rounds.add_argument("--once", action="store_true", help="one round, for cron, Slurm, Kubernetes; status 1: some failed")
    schedule.add_argument("--every", metavar="TIME", help="from round to round of --watch, e.g. 30m, 6h, 1d (default 6h)")
    schedule.add_argument("--suite", metavar="NAME", help="name of a suite, or its YAML (default quick)")
    schedule.add_argument("--retry", metavar="TIME", help="first pause after a failure; then it doubles (default 1h)")
    schedule.add_argument("--timeout", metavar="TIME", help="an evaluation that takes longer has failed (default 1d)")
    options = parser.parse_args(list(arguments))
    only = {"--every": options.watch, **dict.fromkeys(("--suite", "--retry", "--timeout"), options.watch or options.once)}
    for name, allowed in only.items():
        if getattr(options, name[2:]) is not None and not allowed:
            raise UserError(f"{name}: needs --watch" + ("" if name == "--every" else " or --once"))
    runs = options.runs or options.filter
    if not options.watch and not options.once:
        from pl_attnedit.eval.report import write_report

        print(write_report(runs, options.out, options.tracking_uri, options.experiment))
        return 0
    every, retry, timeout = (
        seconds(name, getattr(options, name[2:]) or default)
        for name, default in (("--every", "6h"), ("--retry", "1h"), ("--timeout", "1d"))
    )

    from pl_attnedit.eval.schedule import make_schedule

    ...  # TODO
    if options.watch:
        schedule.watch(every)
        return 0
    failed = schedule.round()
    print(options.out)
    return int(failed > 0)


def seconds(field: str, text: str) -> float:
    """``30m`` in seconds.

    Raises:
        UserError: no number with a unit, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise invalid(field, text, "must be a number above 0 with a unit s, m, h or d, e.g. 30m, 6h, 1d")
    return float(match[1]) * UNITS[match[2]]
