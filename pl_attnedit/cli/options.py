"""What the options of all commands share."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from pl_attnedit.errors import UserError


class OptionParser(ArgumentParser):
    """argparse whose mistakes are one line, without the usage of all options. Names of files and folders have the type
    `os.path.expanduser`: no folder is ever called ~."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
