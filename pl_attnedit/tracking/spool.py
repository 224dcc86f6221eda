"""What is still to be sent to MLflow: a queue in memory, backed by a journal that survives a killed process."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

Operation = dict[str, Any]
END_BYTES = 1 << 16  # of a journal, in which its last line usually is whole


class Spool:
    """Operations of one MLflow run, in order, each with a running number ``n``.

    The journal ``<path>`` (JSON lines) keeps every operation ever added; ``<path stem>.delivered`` holds the number
    up to which MLflow has confirmed them. A line is handed to the operating system before `append` returns, so a
    SIGKILL loses nothing. Killed between MLflow's confirmation and ours, a few operations are sent twice: all of
    them are idempotent (MLflow keeps one metric per key, step, time and value).

    Args:
        path: the journal, ``*.jsonl``; created with its folder where missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._marker = path.with_suffix(".delivered")
        self._lock = threading.Lock()
        self._torn = False  # the journal's last line is incomplete: a kill, or a full disk
        self._journal_failed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last = 0
        self._pending: deque[Operation] = deque()
        self.logged_steps: dict[str, int] = {}  # highest step per metric that earlier processes have logged
        self.reload()

    def reload(self) -> None:
        """Take in what another process has added since."""
        with self._lock:
            delivered = int(self._marker.read_text()) if self._marker.exists() else 0
            new = [op for op in self._read() if op["n"] > self._last]
            # what was confirmed may not be in the journal, of a full disk; its number is taken nevertheless
            self._last = max([self._last, delivered, *(op["n"] for op in new)])
            self._pending.extend(op for op in new if op["n"] > delivered)
            for op in new:
                if op["op"] == "metrics":
                    for key in op["values"]:
                        self.logged_steps[key] = max(op["step"], self.logged_steps.get(key, op["step"]))

    @staticmethod
    def has_pending(path: Path) -> bool:
        """Whether the journal's last operation is not confirmed; reads its end alone, unless that is a long or torn line."""
        marker = path.with_suffix(".delivered")
        with path.open("rb") as journal:
            journal.seek(max(path.stat().st_size - END_BYTES, 0))
            *_, last = [b"", *journal.read().splitlines()]
        try:
            return bool(last) and int(json.loads(last)["n"]) > (int(marker.read_text()) if marker.exists() else 0)
        except (ValueError, KeyError, TypeError):
            return len(Spool(path)) > 0

    def __len__(self) -> int:
        return len(self._pending)

    def append(self, operation: Operation) -> None:
        """Add one operation. A journal that cannot be written is one warning; the operation stays in memory."""
        with self._lock:
            self._last += 1
            operation = {"n": self._last, **operation}
            self._pending.append(operation)
            line = json.dumps(operation, separators=(",", ":")) + "\n"
            try:
                with self.path.open("a", encoding="utf-8") as journal:
                    journal.write("\n" + line if self._torn else line)
                self._torn = False
            except OSError as error:
                self._torn = True
                if not self._journal_failed:
                    rank_zero_warn(f"MLflow spool {self.path} cannot be written ({error}): kept in memory only.")
                self._journal_failed = True

    def head(self, limit: int) -> list[Operation]:
        """The oldest operations that are not confirmed, at most ``limit``; they stay in the queue."""
        with self._lock:
            return [self._pending[i] for i in range(min(limit, len(self._pending)))]

    def confirm(self, operations: list[Operation]) -> None:
        """Take delivered operations, the oldest ones, out of the queue."""
        with self._lock:
            for operation in operations:
                taken = self._pending.popleft()
                assert taken is operation
            temporary = self._marker.with_suffix(".delivered.tmp")
            try:
                temporary.write_text(str(operations[-1]["n"]))
                os.replace(temporary, self._marker)
            except OSError:
                pass  # a full disk: at worst the next start sends them again, which changes nothing

    def pending_metrics(self) -> int:
        """The number of metric values in the queue."""
        with self._lock:
            return sum(len(op["values"]) for op in self._pending if op["op"] == "metrics")

    def _read(self) -> list[Operation]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        self._torn = bool(text) and not text.endswith("\n")
        operations = []
        for line in text.splitlines():
            try:
                operation = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, cut by a kill in the middle of the write: it was never acknowledged
            if isinstance(operation, dict) and "n" in operation:
                operations.append(operation)
        return operations
