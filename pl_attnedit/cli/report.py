"""`pl-attnedit report`: conversions as an HTML page, Markdown or JSON, once or on a schedule with missing evaluations."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from glob import glob
from os.path import expanduser
from pathlib import Path

from pl_attnedit.cli.devices import device_option
from pl_attnedit.cli.options import OptionParser, chosen_runs, runs_options
from pl_attnedit.errors import UserError, invalid

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="pl-attnedit report", description="A report about conversions.")
    runs_options(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=expanduser,
        default="report.html",
        help="file to write: .html (one self-contained page), .md (for a pull request) or .json (the numbers, and curves "
        "of the training) (default report.html)",
    )
    group = parser.add_argument_group(
        "schedule", "Before the report is written, students and checkpoints that the suite has not seen are evaluated."
    )
    rounds = group.add_mutually_exclusive_group()
    rounds.add_argument("--watch", action="store_true", help="round after round, until SIGTERM, SIGHUP or Ctrl-C")
    rounds.add_argument("--once", action="store_true", help="one round; status 1 where an evaluation failed")
    group.add_argument("--every", metavar="TIME", help="from round to round, e.g. 30m, 6h, 1d (default 6h)")
    group.add_argument("--suite", type=expanduser, help="as in `pl-attnedit eval` (default quick)")
    group.add_argument("--text", type=expanduser, help="likewise")
    group.add_argument("--bigbench", nargs="+", type=expanduser, help="likewise")
    device_option(group)
    group.add_argument(
        "--retry", metavar="TIME", help="pause after a failure; each further one doubles it (default 1h)"
    )
    group.add_argument("--timeout", metavar="TIME", help="an evaluation that takes longer has failed (default 1d)")
    options = parser.parse_args(list(arguments))
    options.runs = chosen_runs(options)
    scheduled = options.watch or options.once
    for name in ("every", "suite", "text", "bigbench", "device", "retry", "timeout"):
        if getattr(options, name) is not None and not (options.watch if name == "every" else scheduled):
            raise UserError(f"--{name}: needs --watch" + ("" if name == "every" else " or --once"))
    return _rounds(options) if scheduled else _report(options)


def _report(options: Namespace) -> int:
    from pl_attnedit.eval.report.page import write_report

    print(write_report(options.runs, options.out, options.tracking_uri, options.experiment))
    return 0


def _rounds(options: Namespace) -> int:
    every = seconds("--every", options.every or "6h")
    retry, timeout = seconds("--retry", options.retry or "1h"), seconds("--timeout", options.timeout or "1d")
    from pl_attnedit.data.lookups import check_judged
    from pl_attnedit.data.sources import BUILTIN
    from pl_attnedit.eval.harness.suites import load_suite
    from pl_attnedit.eval.records import SUITE_TAG, VERSION_TAG
    from pl_attnedit.eval.schedule.watch import Schedule, absolute_uri

    check_judged("--text", options.text or BUILTIN)
    suite = load_suite(options.suite or "quick")
    for_eval = ["--device", options.device] if options.device else []
    for_eval += ["--text", absolute(options.text)] if options.text else []
    for_eval += ["--bigbench", *map(absolute, options.bigbench)] if options.bigbench else []
    schedule = Schedule(
        os.path.abspath(options.suite)
        if (options.suite or "").endswith((".yaml", ".yml"))
        else options.suite or "quick",
        {SUITE_TAG: suite.name, VERSION_TAG: suite.version_on(options.text or BUILTIN, options.bigbench)},
        Path(options.out),
        runs=options.runs,
        tracking_uri=absolute_uri(options.tracking_uri),
        experiment=options.experiment,
        retry=retry,
        timeout=timeout,
        options=for_eval,
    )
    if options.watch:
        schedule.watch(every)
        return 0
    failed = schedule.round()
    print(options.out)
    return 1 if failed else 0


def absolute(name: str) -> str:
    """The name of files here as others find them; any other name as it is."""
    return os.path.abspath(name) if glob(name) else name


def seconds(field: str, text: str) -> float:
    """``30m`` in seconds.

    Raises:
        UserError: no number with a unit, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise invalid(field, text, "must be a number above 0 with a unit s, m, h or d, e.g. 30m, 6h, 1d")
    return float(match[1]) * UNITS[match[2]]
