"""What the options of all commands share."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn

from pl_attnedit.config_files import load_yaml
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import json_text

TEACHER_HELP = "hub name, folder, GGUF file, package:NAME or shape:NAME (random weights)"


class OptionParser(ArgumentParser):
    """argparse whose mistakes are one line, without the usage of all options. Names of files and folders have the type
    `os.path.expanduser`: no folder is ever called ~."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def teacher_option(parser: ArgumentParser, otherwise: str) -> None:
    """Of a command that gets a student, too; see `known_teacher`."""
    parser.add_argument("--teacher", help=f"{TEACHER_HELP} (default {otherwise})")


def known_teacher(given: str | None, *students: str) -> str:
    """The teacher that was given, else the one that the first student says it has."""
    if given is not None:
        return given
    if not students:
        raise UserError("--teacher: must be given where there is no student")
    from pl_attnedit.eval.students import teacher_of

    return teacher_of(students[0])


def out_option(parser: ArgumentParser, default: str | None, help_: str) -> None:
    """Where the result goes."""
    earlier_spelling(
        parser, "--output", parser.add_argument("-o", "--out", type=expanduser, default=default, help=help_)
    )


def json_option(parser: ArgumentParser) -> None:
    """Of a command that prints a table."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def at_least(least: int, options: Namespace, *names: str) -> None:
    """Refuses smaller values; None is not given."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            raise invalid("--" + name.replace("_", "-"), value, f"must be at least {least}")


def runs_options(parser: ArgumentParser) -> None:
    """Which conversions; see `chosen_runs`."""
    parser.add_argument("runs", nargs="*", help="run ids of conversions (default: all)")
    parser.add_argument("--filter", help="an MLflow search filter instead, e.g. \"tags.target = 'mla'\"")
    parser.add_argument("--experiment", default="pl_attnedit", help="MLflow experiment (default pl_attnedit)")
    parser.add_argument("--tracking-uri", help="MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")


def chosen_runs(options: Namespace) -> list[str] | str | None:
    """Run ids, or a filter, or None for all."""
    if options.runs and options.filter:
        raise invalid("--filter", options.filter, "goes without run ids")
    return options.runs or options.filter


def show(result: Any, table: str, written: str | Path | None = None, *, as_json: bool) -> None:
    """The table, or JSON alone, and where it was written."""
    print(json_text(result, default=asdict).strip() if as_json else table)
    if written is not None:
        print(written, file=sys.stderr if as_json else sys.stdout)


def earlier_spelling(parser: ArgumentParser, name: str, option: Any) -> None:
    """What an option was once called; it is not listed."""
    parser.add_argument(name, dest=option.dest, type=option.type, default=SUPPRESS, help=SUPPRESS)


def yaml_value(text: str) -> Any:
    """The type of options that are written as in YAML."""
    try:
        return load_yaml(text)
    except UserError as error:
        raise ArgumentTypeError(f"{text!r} {error}") from error
