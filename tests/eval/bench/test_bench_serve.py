"""`bench serve` with an engine whose times and numbers are known; tests/serving runs it in vLLM."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pl_attnedit.cli import main
from pl_attnedit.eval.bench import vllm_engines
from pl_attnedit.eval.bench.serve import Load, _together, bench_serve, counter, loads_of, serve_table


class Counting:
    """Answers at once, three tokens at a time, with `places` texts at once, as if it had a cache of prefixes."""

    def __init__(self, places: int) -> None:
        self.places, self.running, self.asked, self.found = asyncio.Semaphore(places), 0, 0, 0
        self.known: set[tuple[int, ...]] = set()

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        async with self.places:
            self.running += 1
            self.asked += len(prompt)
            self.found += max((n for n in range(len(prompt)) if tuple(prompt[:n]) in self.known), default=0)
            self.known |= {tuple(prompt[:n]) for n in range(len(prompt))}
            for tokens in range(min(3, new_tokens), new_tokens + 1, 3):
                await asyncio.sleep(0.03)
                yield tokens
            self.running -= 1

    async def metrics(self) -> str:
        return (
            f'vllm:num_requests_running{{engine="0"}} {self.running}.0\n'
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.asked}\nvllm:prefix_cache_hits_total {self.found}\n'
        )


def test_figures_of_teacher_and_student() -> None:
    started = []

    @asynccontextmanager
    async def start(model: str) -> AsyncIterator[Counting]:
        started.append(model)
        yield Counting(int(model))

    loads = loads_of([8], [float("inf")], [0.0, 0.5], requests=8, new_tokens=6)
    result = bench_serve({"teacher": "2", "student": "4"}, start, loads, vocabulary=1000)
    assert started == ["2", "4"]
    assert [(row["model"], row["shared"]) for row in result["rows"]] == [
        ("teacher", 0),
        ("teacher", 4),
        ("student", 0),
        ("student", 4),
    ]
    assert [row["at_once"] for row in result["rows"]] == [2, 2, 4, 4]
    assert [row["hits"] for row in result["rows"]] == [0, 0.5, 0, 0.5]
    assert all(row["between_ms"]["p99"] > 0 and row["output_tokens_per_s"] > 0 for row in result["rows"])
    assert [ratio["at_once"] for ratio in result["ratios"]] == [2, 2]
    assert all(row["decode_tokens_per_s"] is None for row in result["rows"]), "some waited until others had ended"
    table = serve_table({**result, "vllm": "0", "engine": {}})
    assert "student / teacher at 8 tokens, rate inf, 4 shared: at_once 2.00" in table


def test_tokens_per_second_while_all_are_answered() -> None:
    assert _together([[0, 1, 2, 3, 4], [0, 2, 3, 4, 5]]) == 2
    assert _together([[0, 1, 2], [0, 2, 3]]) is None


def test_prompts_are_new_for_each_seed_and_share_what_they_are_to() -> None:
    load = Load(context=12, new_tokens=1, requests=3, rate=1.0, shared=5)
    first, second = load.prompts(10_000, 0), load.prompts(10_000, 1)
    assert len({tuple(prompt[:5]) for prompt in first}) == 1
    assert len({tuple(prompt[5:]) for prompt in first + second}) == 6
    assert first[0][:5] != second[0][:5]
    assert {len(prompt) for prompt in first} == {12}


def test_a_metric_is_summed_over_its_labels() -> None:
    text = 'vllm:a{engine="0"} 2.0\nvllm:a{engine="1"} 3.0\nvllm:a_total{engine="0"} 9.0\n# vllm:a 5'
    assert counter(text, "a") == 5


def test_options_of_the_server() -> None:
    options = {
        "kv_cache_memory_bytes": 7,
        "enforce_eager": True,
        "async_scheduling": False,
        "compilation_config": {"a": 1},
    }
    expected = ["--kv-cache-memory-bytes", "7", "--enforce-eager", "--no-async-scheduling", "--compilation-config"]
    assert vllm_engines.flags(options) == [*expected, '{"a": 1}']


def test_what_a_server_said_last() -> None:
    text = "(APIServer) INFO 1 [x.py:3] fine\n(EngineCore) ERROR 1 [y.py:4] UserError: weights are missing: a\nbye\n"
    assert vllm_engines.last_error(text) == "UserError: weights are missing: a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "0"], "--contexts = 0"),
        (["--shared", "1"], r"--shared = 1.0"),
        (["--engine", "[1]"], "--engine = [1]"),
        (["--vllm", "no-such-command"], "--vllm: no-such-command cannot be started"),
        ([], "vLLM is not installed here"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    make_teacher: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "openai", type(sys)("openai"))
    monkeypatch.setattr(sys.modules["openai"], "AsyncOpenAI", object, raising=False)
    make_teacher("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    assert main(["bench", "serve", "--teacher", str(tmp_path), "--student", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_it_is_logged(store: tuple[str, list[str]], tmp_path: Path) -> None:
    from pl_attnedit.cli.bench.serve import log
    from pl_attnedit.tracking import connect

    row = {
        "model": "s",
        "context": 8,
        "rate": "inf",
        "shared": 4,
        "at_once": 3,
        "output_tokens_per_s": 5.0,
        "hits": 0.5,
    }
    row |= {"preemptions": 0, "first_ms": {"p50": 1.0, "p99": 2.0}, "between_ms": {}}
    result = {"rows": [row], "ratios": [], "vllm": "0.32.0", "models": {"teacher": "t"}, "engine": {"dtype": "float32"}}
    client = connect(f"sqlite:///{shutil.copy(Path(store[0].removeprefix('sqlite:///')), tmp_path)}")
    run = client.get_run(log(client, result))
    assert run.data.metrics["serve/s/8_rate_inf_shared_4/first_ms_p99"] == 2
    assert run.data.params["dtype"] == "float32"
    assert run.info.status == "FINISHED"
