"""What the options of all commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any, NoReturn

from pl_attnedit.config_files import load_yaml
from pl_attnedit.errors import UserError


class OptionParser(ArgumentParser):
    """argparse whose mistakes are one line, without the usage of all options. Names of files and folders have the type
    `os.path.expanduser`: no folder is ever called ~."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def yaml_value(text: str) -> Any:
    """The type of options that are written as in YAML."""
    try:
        return load_yaml(text)
    except UserError as error:
        raise ArgumentTypeError(f"{text!r} {error}") from error
