"""`bench serve`: teacher and students in turn in vLLM, in one engine configuration, under the same load."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np

from pl_attnedit.eval.progress import Progress
from pl_attnedit.eval.report.formatting import aligned

SAMPLED_S = 0.05  # seconds between two readings of the number of running requests


class Engine(Protocol):
    """A running vLLM, in this process or behind HTTP."""

    def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """How many tokens of the answer there are, each time that more arrive."""

    async def metrics(self) -> str:
        """vLLM's own, in Prometheus' format."""


@dataclass(frozen=True)
class Load:
    """Requests of random tokens.

    Args:
        context: tokens of each prompt.
        new_tokens: tokens of each answer, which nothing ends earlier.
        requests: how many.
        rate: of requests per second, which arrive at random; inf = all at once.
        shared: first tokens that all prompts have in common; they are in the cache when the first one arrives.
    """

    context: int
    new_tokens: int
    requests: int
    rate: float
    shared: int = 0

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Others for another seed, so that no cache has them."""
        chance = random.Random(f"{seed} {self}")
        prefix = chance.choices(range(vocabulary), k=self.shared)
        return [prefix + chance.choices(range(vocabulary), k=self.context - self.shared) for _ in range(self.requests)]


async def measure(engine: Engine, load: Load, vocabulary: int, seed: int) -> dict[str, Any]:
    """One load on a running engine.

    Returns:
        `at_once`: most texts that were in work at a time, by vLLM's own count; `output_tokens_per_s` from the first
        request to the last token; `decode_tokens_per_s` while every request is answered, None where there is no such
        time; `first_ms` and `between_ms`: p50 and p99 of the times to the first token and between tokens;
        `hits`: share of the prompts' tokens that were found in the cache; `preemptions`.
    """
    prompts = load.prompts(vocabulary, seed)
    if load.shared:
        await _answer(engine, [*prompts[0][: load.shared], 0], 1)
    before, running = await engine.metrics(), [0.0]
    watch = asyncio.create_task(_watch(engine, running))
    chance, start = random.Random(seed), time.perf_counter()
    tasks = []
    try:
        for prompt in prompts:
            tasks.append(asyncio.create_task(_answer(engine, prompt, load.new_tokens)))
            await asyncio.sleep(0 if math.isinf(load.rate) else chance.expovariate(load.rate))
        answers = await asyncio.gather(*tasks)
    finally:
        for task in (watch, *tasks):
            task.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    after = await engine.metrics()
    seconds = max(times[-1] for times in answers) - start
    asked, found, preempted = (
        counter(after, name) - counter(before, name)
        for name in ("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total")
    )
    return {
        "at_once": round(max(running)),
        "output_tokens_per_s": load.requests * load.new_tokens / seconds,
        "decode_tokens_per_s": _together(answers),
        "first_ms": _percentiles([times[1] - times[0] for times in answers]),
        "between_ms": _percentiles([gap for times in answers for gap in np.diff(times[1:])]),
        "hits": found / asked if asked else 0.0,
        "preemptions": round(preempted),
    }


async def _answer(engine: Engine, prompt: list[int], new_tokens: int) -> list[float]:
    """When the request was sent, and when each token of its answer was there; of those that came together as if evenly."""
    times = [time.perf_counter()]
    async for tokens in engine.stream(prompt, new_tokens):
        last, now, new = times[-1], time.perf_counter(), tokens - (len(times) - 1)
        # tokens of the first chunk share its time; those of later chunks are spread evenly over the gap before it
        times += [now] * new if len(times) == 1 else [last + (now - last) * (i + 1) / new for i in range(new)]
    return times


def _together(answers: Sequence[Sequence[float]]) -> float | None:
    """Tokens per second from the time when all answers have begun until one has ended."""
    begin, end = max(times[1] for times in answers), min(times[-1] for times in answers)
    tokens = sum(begin < time <= end for times in answers for time in times[1:])
    return tokens / (end - begin) if end > begin else None


async def _watch(engine: Engine, running: list[float]) -> None:
    while True:
        running.append(counter(await engine.metrics(), "num_requests_running"))
        await asyncio.sleep(SAMPLED_S)


def counter(metrics: str, name: str) -> float:
    """The sum of one of vLLM's metrics over its labels."""
    return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE))


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(1000 * np.percentile(seconds, q)) for q in (50, 99)} if seconds else {}


def bench_serve(
    models: Mapping[str, str],
    start: Callable[[str], AbstractAsyncContextManager[Engine]],
    loads: Sequence[Load],
    vocabulary: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All loads on all models, one engine at a time.

    Args:
        models: name -> what `start` takes; the teacher first.
        vocabulary: tokens of prompts are below it.

    Returns:
        `rows`: a model, a load and what `measure` returns each; `ratios`: each student over the teacher by load.
    """

    rows: list[dict[str, Any]] = []
    progress = (progress or Progress()).begin(
        len(models) * len(loads), lambda: {"rows": rows, "ratios": list(_ratios(rows, len(loads)))}
    )

    async def run() -> None:
        for name, model in models.items():
            progress.say(f"{name}: vLLM starts")
            async with start(model) as engine:
                await _answer(
                    engine, [1] * min(load.context for load in loads), 2
                )  # what only a first request waits for
                for load in loads:
                    progress.next(f"{name}, {load.context:,} tokens, {load.rate:g} requests/s, {load.shared:,} shared")
                    found = await measure(engine, load, vocabulary, seed)
                    rows.append({"model": name, **asdict(load), "rate": str(load.rate), **found})

    asyncio.run(run())
    return progress.result()


def _ratios(rows: Sequence[dict[str, Any]], loads: int) -> Iterator[dict[str, Any]]:
    for place, row in enumerate(rows[loads:]):
        teacher = rows[place % loads]
        ratio = {name: row[name] for name in ("model", "context", "rate", "shared")}
        ratio |= {name: row[name] / teacher[name] for name in ("at_once", "output_tokens_per_s") if teacher[name]}
        yield ratio | {
            name: row[name]["p50"] / teacher[name]["p50"] for name in ("first_ms", "between_ms") if row[name]
        }


def loads_of(
    contexts: Sequence[int], rates: Sequence[float], shared: Sequence[float], requests: int, new_tokens: int
) -> list[Load]:
    """Every context at every rate with every share of a prompt that is in the cache."""
    return [
        Load(context, new_tokens, requests, rate, int(share * context))
        for context, rate, share in product(contexts, rates, shared)
    ]


def serve_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    head = ("context", "requests/s", "hits", "model", "at once", "output tokens/s", "first token ms p50, p99")
    table: list[tuple[str, ...]] = [(*head, "between tokens ms p50, p99")]
    for row in sorted(result["rows"], key=lambda row: (row["context"], row["shared"], float(row["rate"]))):
        times = [", ".join(f"{value:,.1f}" for value in row[name].values()) for name in ("first_ms", "between_ms")]
        place = (f"{row['context']:,}", row["rate"], f"{row['hits']:.0%}")
        table.append((*place, row["model"], f"{row['at_once']:,}", f"{row['output_tokens_per_s']:,.1f}", *times))
    lines = aligned(table)
    lines += [
        f"{ratio['model']} / teacher at {ratio['context']:,} tokens, rate {ratio['rate']}, {ratio['shared']:,} shared: "
        + ", ".join(f"{name} {ratio[name]:.2f}" for name in list(ratio)[4:])
        for ratio in result["ratios"]
    ]
    return "\n".join([*lines, f"vLLM {result['vllm']}, {result['engine']}"])
