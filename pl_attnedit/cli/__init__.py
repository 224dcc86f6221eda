"""The command line `pl-attnedit`. One file per command; each has a `main(arguments) -> exit status` and a one-line text."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from pl_attnedit.cli.messages import farewell, message_of
from pl_attnedit.errors import UserError
from pl_attnedit.files import no_room

COMMANDS: dict[str, str] = {
    "convert": "run a whole conversion from a recipe: init, stage 1, stage 2, evaluation, report",
    "study": "one recipe with variations, each a conversion, compared with intervals",
    "sensitivity": "what editing each layer costs, and an edit plan for a KV budget",
    "generate-data": "text for training, sampled from the teacher itself",
    "prepare": "tokenise and pack text ahead of time",
    "fit": "train one stage (LightningCLI)",
    "validate": "measure a student against its teacher (LightningCLI)",
    "eval": "let teacher and student answer the same lm-eval tasks",
    "compare": "conversions side by side, from MLflow",
    "report": "one HTML page about conversions, from MLflow",
    "generate": "text from a converted model",
    "export": "a converted model as a stock checkpoint for other software",
    "doctor": "what this machine offers, and whether a config can run on it",
    "bench": "bytes of real caches, inits without training, speed and memory of decoding and of the stages",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. A user's mistake is one message and status 2; a signal is one message and status 128 + signal."""
    status = 0
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:  # of a process that was started without one
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for Python's own flush at the end
        if isinstance(error, BrokenPipeError):  # of `| head`, which has seen enough
            return 128 + signal.SIGPIPE
        if (message := no_room(error, "standard output")) is None:
            raise
        if not status:  # else it has been said
            print(f"pl-attnedit: error: {message}", file=sys.stderr)
        return status or 2
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"pl-attnedit {_version()}")
        return 0
    if name not in COMMANDS:
        print(f"pl-attnedit: error: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        if {"-h", "--help"} & set(rest):  # does not wait for torch
            return _main_of(name)(rest)
        _check_names(rest)
        return _until_a_signal(name, rest)
    except SystemExit as left:  # of --help and of argparse's own errors
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        in_one_line = " ".join(message.splitlines())
        print(f"pl-attnedit {name}: error: {in_one_line}", file=sys.stderr)
        return 2


def _check_names(arguments: list[str]) -> None:
    """MLflow, tokenizers and safetensors take no other names, and some find that out after a training."""
    try:
        for each in (*arguments, os.getcwd()):
            each.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{each!r}: must be UTF-8, as all names of files and folders") from error
    except FileNotFoundError as error:
        raise UserError("the working folder is no longer there") from error


def _main_of(name: str) -> Callable[[list[str]], int]:
    if name in ("fit", "validate"):  # two of LightningCLI's own subcommands
        main = importlib.import_module("pl_attnedit.cli.fit").main
        return lambda arguments: main([name, *arguments])
    return importlib.import_module(f"pl_attnedit.cli.{name.replace('-', '_')}").main


def _until_a_signal(name: str, arguments: list[str]) -> int:
    from pl_attnedit.cli.quiet import quiet
    from pl_attnedit.interruption import Interrupted, termination_as_exception

    quiet()
    try:
        with termination_as_exception():
            return _main_of(name)(arguments)
    except Interrupted as stopped:
        interrupted = stopped
    except KeyboardInterrupt:
        interrupted = Interrupted(signal.SIGINT)
    except SystemExit as left:
        if not isinstance(left.__context__, KeyboardInterrupt):  # the Trainer turns Ctrl-C into one
            raise
        interrupted = Interrupted(signal.SIGINT)
    print(f"pl-attnedit {name}: {farewell(name, interrupted)}", file=sys.stderr)
    return 128 + interrupted.signum


def _version() -> str:
    try:
        return metadata.version("pl_attnedit")
    except metadata.PackageNotFoundError:  # imported from a folder that nobody has installed
        return "unknown"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: pl-attnedit COMMAND [options] | --version; `pl-attnedit COMMAND --help` explains each\n\n"
        + "\n".join(lines)
    )
