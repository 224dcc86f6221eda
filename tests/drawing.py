"""vl-convert in a process of its own: it draws by a thread, which a forked process does not have, and many tests fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

SERVER = """
import json, sys, vl_convert
for line in sys.stdin:
    print(json.dumps(vl_convert.vegalite_to_svg(json.loads(line))), flush=True)
"""


class Drawing:
    """Stands in for `vl_convert.vegalite_to_svg`; each process that draws has a server of its own, which ends with it."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._server: Any = None

    def __call__(self, spec: str) -> str:
        if self._owner != os.getpid():
            pipe = subprocess.PIPE
            self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
            self._owner = os.getpid()
        self._server.stdin.write(json.dumps(spec) + "\n")
        self._server.stdin.flush()
        return str(json.loads(self._server.stdout.readline()))
