"""`pl-attnedit study`: one recipe with variations, each a conversion, compared with intervals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from pl_attnedit.cli.options import OptionParser, at_least, json_option, out_option, show
from pl_attnedit.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(
        prog="pl-attnedit study",
        description="Run the conversions of a study, those that are not done yet, and compare its variants. A variant's "
        "fields lie over those of `change`, these over the base: mappings merge, lists and values replace. Options after -- "
        "go to every `pl-attnedit convert`.",
    )
    parser.add_argument(
        "study", type=expanduser, help="YAML with name, base (a recipe), variants, change, seeds; see configs/studies"
    )
    parser.add_argument("--only", nargs="+", help="run only variants whose name contains one of these")
    parser.add_argument("--workers", type=int, default=1, help="conversions at a time, GPUs taken in turn (default 1)")
    parser.add_argument("--runs", type=expanduser, default="runs", help="folder of the run folders (default runs)")
    parser.add_argument("--no-run", action="store_true", help="only compare what is done, of all variants")
    out_option(parser, None, "file for the comparison (default RUNS/STUDY/study.json)")
    json_option(parser)
    given = list(arguments)
    split = given.index("--") if "--" in given else len(given)
    options, passed_on = parser.parse_args(given[:split]), given[split + 1 :]
    at_least(1, options, "workers")

    from pl_attnedit.conversion.study import read_study
    from pl_attnedit.conversion.study_results import study_table
    from pl_attnedit.conversion.study_run import StudyRun
    from pl_attnedit.files import check_output, json_text, write_atomically

    if options.out:
        check_output("--out", options.out)
    run = StudyRun(read_study(options.study), Path(options.runs), passed_on, options.workers, options.only)
    failed = [] if options.no_run else run.run()
    results = run.results()
    if results["rows"]:
        written = write_atomically(options.out or run.folder / "study.json", json_text(results))
        show(results, study_table(results), written, as_json=options.json)
    elif not failed:
        raise UserError(f"study {run.study.name}: none of its conversions is done (with these options after --)")
    for each in failed:
        print(f"failed: {each}", file=sys.stderr if options.json else sys.stdout)
    return 1 if failed else 0
