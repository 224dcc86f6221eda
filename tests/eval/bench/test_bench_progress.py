"""Every benchmark says what it measures, and one that is ended early prints what it has measured so far."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fixtures_stages import cache_of_tests, session_cache, teacher_folder, tiny_corpus, tiny_tokenizer  # noqa: F401
from test_bench_serve import Counting

from pl_attnedit.cli import main
from pl_attnedit.eval.bench import stages, vllm_engines
from pl_attnedit.eval.progress import Progress

TARGET = ["--target", "{type: mla, kv_lora_rank: 8, qk_rope_head_dim: 4}", "--teacher", "{teacher}"]
STEP = [*TARGET, "--batch", "1", "--seq", "8", "--compiled", "false"]
TEXT = ["--calibration", "{text}", "--heldout", "{text}", "--seq-len", "16", "--calibration-sequences", "1"]
SMALL = {
    "cache": ["--teacher", "{teacher}", "--contexts", "8", "16"],
    "init": ["--teacher", "{teacher}", *TEXT, "--rows", "gate_swa"],
    "loss": ["--vocabulary", "9", "--hidden", "8", "--tokens", "4"],
    "decode": [*TARGET, "--contexts", "8", "--batches", "1", "--new-tokens", "1"],
    "stage1": STEP,
    "stage2": STEP,
    "checkpoint": [*STEP, "--folder", "{folder}"],
    "trl": ["--beside", "--rounds", "2"],
    "serve": ["--teacher", "{teacher}", "--student", "{teacher}", "--contexts", "8", "--vllm", "none"],
}


@pytest.fixture
def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of vLLM and of other processes."""

    @asynccontextmanager
    async def engine(*_: Any, **__: Any) -> AsyncIterator[Counting]:
        yield Counting(64)

    def measured(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        peaks = dict.fromkeys(("peak_bytes", "libraries_bytes", "models_bytes"), 1)
        return subprocess.CompletedProcess([], 0, json.dumps({"step_seconds": [1.0], "losses": [1.0], **peaks}), "")

    monkeypatch.setattr(vllm_engines, "over_http", engine)
    monkeypatch.setattr(vllm_engines, "vllm_version", lambda command: "0")
    monkeypatch.setattr(subprocess, "run", measured)
    monkeypatch.setattr(stages, "matmul_rate", lambda *_: 1.0)


@pytest.mark.usefixtures("without_others")
@pytest.mark.parametrize("name", SMALL)
def test_one_that_is_ended_prints_what_it_has_measured(
    name: str,
    teacher_folder: Callable[..., str],  # noqa: F811
    tiny_corpus: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say = Progress.say

    def ended(progress: Progress, what: str) -> None:
        say(progress, what)
        if "(2 of " in what:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "say", ended)
    places = {"teacher": teacher_folder(), "text": tiny_corpus, "folder": tmp_path}
    arguments = [
        "bench",
        name,
        *(given.format(**places) if given in map("{{{}}}".format, places) else given for given in SMALL[name]),
    ]
    assert main([*arguments, "--json"]) == 143
    printed = capsys.readouterr()
    assert json.loads(printed.out)["incomplete"] is True
    assert re.search(
        r"\(1 of \d+\)$.*\(2 of \d+; 0:00:\d\d so far, about \d:\d\d:\d\d left\)$", printed.err, re.M | re.S
    )
    assert re.search(r"pl-attnedit bench: interrupted by SIGTERM.*; start it again\n$", printed.err)
    assert not list(tmp_path.iterdir())
    if name == "loss":  # all others' tables have been made too
        assert main(arguments) == 143
        *_, value, last = capsys.readouterr().out.splitlines()
        assert value.startswith("loss_ms ")
        assert last == "incomplete: ended in measurement 2 of 2"


def test_there_are_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench"])
    assert f"There are {', '.join(SMALL)};" in capsys.readouterr().err
