"""The command line `pl-attnedit`. One file per command; each has a `main(arguments) -> exit status` and a one-line text."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {
    "convert": "run a whole conversion from a recipe: init, stage 1, stage 2, evaluation, report",
    "fit": "train one stage (LightningCLI)",
    "validate": "measure a student against its teacher (LightningCLI)",
    "eval": "let teacher and student answer the same lm-eval tasks",
    "compare": "conversions side by side, from MLflow",
    "report": "one HTML page about conversions, from MLflow",
    "generate": "text from a converted model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. A user's mistake is one message and status 2; an interrupt is status 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"pl-attnedit: error: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    from pl_attnedit.errors import UserError

    module = importlib.import_module(f"pl_attnedit.cli.{'fit' if name == 'validate' else name}")
    try:
        return module.main([name, *rest] if module.__name__.endswith(".fit") else rest)
    except UserError as error:
        print(f"pl-attnedit {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pl-attnedit {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: pl-attnedit COMMAND [options]; `pl-attnedit COMMAND --help` explains each\n\n" + "\n".join(lines)
