"""`vllm serve STUDENT` as a process of its own, asked over HTTP by the openai client: run by `make test-vllm`."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import BLOCK, SHAPE, build_student, greedy
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pl_attnedit import GateSWAConfig, MLAConfig, UserError
from pl_attnedit.eval.bench.serve import Load, counter, measure
from pl_attnedit.eval.bench.vllm_engines import OverHTTP, over_http

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: see `make test-vllm`")

COMMAND = str(Path(sys.executable).with_name("vllm"))
CONTEXT = 2048
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK,
    "max_model_len": CONTEXT,
    "kv_cache_memory_bytes": 2**25,
}

COUNTERS = ("prompt_tokens", "generation_tokens", "prefix_cache_hits", "num_preemptions")


@pytest.fixture
def student(make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Windows with kept sinks beside latents, and a tokenizer, saved in `tmp_path`."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    targets = {"S": GateSWAConfig(window=48, sinks=4), "M": MLAConfig(40, 16)}
    student = build_student(make_teacher("llama", **SHAPE), targets, "SSSM")
    student.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    return student


async def text(engine: OverHTTP, prompt: Any) -> str:
    """Sixteen tokens, streamed."""
    settings: Any = {"model": "bench", "max_tokens": 16, "temperature": 0, "stream": True}
    chunks = await engine.client.completions.create(prompt=prompt, extra_body={"ignore_eos": True}, **settings)
    return "".join([chunk.choices[0].text async for chunk in chunks])


def test_answers_over_http_are_hugging_faces(student: Any, make_ids: Callable[..., Any], tmp_path: Path) -> None:
    """Streamed, several at once, from words and from tokens; figures of `bench serve`."""
    prompts = [make_ids(1, length, seed=length)[0].tolist() for length in (5, 300)]

    async def ask() -> None:
        async with over_http(COMMAND, str(tmp_path), OPTIONS) as engine:
            asked = [*prompts, " ".join(f"w{token}" for token in prompts[0])]
            found = await asyncio.gather(*(text(engine, prompt) for prompt in asked))
            for answer, prompt in zip(found, [*prompts, prompts[0]]):
                assert answer.split() == [f"w{token}" for token in greedy(student, prompt, 16)]
            figures = await measure(engine, Load(256, 8, 6, float("inf"), shared=192), 64, seed=0)
            assert figures["hits"] > 0.3
            assert figures["output_tokens_per_s"] > 0

    asyncio.run(ask())


def test_a_damaged_student_is_refused_in_one_line(student: Any, tmp_path: Path) -> None:
    lost = "model.layers.0.self_attn.gate_proj.weight"
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})

    async def start() -> None:
        async with over_http(COMMAND, str(tmp_path), OPTIONS):
            pass

    with pytest.raises(UserError, match=f"has ended: .*missing: {lost}|not initialized.*{lost}") as caught:
        asyncio.run(start())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_under_load_and_killed(student: Any, make_ids: Callable[..., Any], tmp_path: Path) -> None:
    """64 clients for `PL_ATTNEDIT_LOAD_S` (60) seconds: lengths at random up to the context, some leave early, not all fit.

    No error, memory flat, nothing left in the cache; killed in the middle of an answer and started again: as before.
    """
    from httpx import HTTPError
    from openai import APIError

    seconds = float(os.environ.get("PL_ATTNEDIT_LOAD_S", "60"))
    prompts = [make_ids(1, length, seed=length)[0].tolist() for length in (5, 300, 1500)]

    async def run() -> None:
        async with over_http(COMMAND, str(tmp_path), {**OPTIONS, "kv_cache_memory_bytes": 2**24}) as engine:
            before = [await text(engine, prompt) for prompt in prompts]
            await load(engine, seconds)
            assert [await text(engine, prompt) for prompt in prompts] == before
            metrics = await engine.metrics()
            assert counter(metrics, "num_requests_running") == counter(metrics, "kv_cache_usage_perc") == 0
            print({name: counter(metrics, f"{name}_total") for name in COUNTERS})
            answer = engine.stream(prompts[0], 2000)
            await anext(answer)
            [server] = psutil.Process().children()
            server.kill()
            with pytest.raises((APIError, HTTPError)):
                [tokens async for tokens in answer]
        async with over_http(COMMAND, str(tmp_path), OPTIONS) as engine:
            assert [await text(engine, prompt) for prompt in prompts] == before

    asyncio.run(run())


async def load(engine: OverHTTP, seconds: float) -> None:
    chance, end, answers, held = random.Random(0), time.monotonic() + seconds, [0, 0], []
    shared = chance.choices(range(64), k=CONTEXT // 2)

    async def client() -> None:
        while time.monotonic() < end:
            new = chance.randrange(1, 100)
            length = chance.randrange(1, CONTEXT - new + 1)
            prompt = [*chance.choice([shared, []]), *chance.choices(range(64), k=length)][:length]
            leaves = chance.random() < 0.2
            async for tokens in engine.stream(prompt, new):
                if leaves and tokens > new // 2:
                    break
            else:
                assert tokens == new
            answers[leaves] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            family = [p for c in psutil.Process().children() for p in [c, *c.children(recursive=True)]]
            held.append(sum(p.memory_info().rss for p in family) / 1e9)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client() for _ in range(64)))
    # at first vLLM's worker grows, with the teacher too
    half, last = max(held[len(held) // 2 :][:5]), max(held[-5:])
    print(f"{answers[0]} answers, {answers[1]} cut short, {half:.3f} GB at half time, {last:.3f} at the end")
    assert min(answers) > 0
    assert last < 1.1 * half
