"""`pl-attnedit bench`: one file for each benchmark, with its options and how it is run."""

from __future__ import annotations

from collections.abc import Sequence

from pl_attnedit.cli.bench import cache, checkpoint, decode, init, loss, serve, stages, trl
from pl_attnedit.cli.options import OptionParser, json_option
from pl_attnedit.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="pl-attnedit bench", description="Benchmarks of converted models.")
    commands = parser.add_subparsers(dest="command")
    for benchmark in (cache, init, loss, decode, stages, checkpoint, trl, serve):
        benchmark.add_to(commands)
    for command in commands.choices.values():
        json_option(command)
    options = parser.parse_args(list(arguments))
    if options.command is None:
        raise UserError(
            f"which one? There are {', '.join(commands.choices)}; `pl-attnedit bench NAME --help` explains each"
        )
    status: int = options.run(options)
    return status
