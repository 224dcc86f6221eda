"""vLLM for `bench serve`: in this process, or `vllm serve` as a process of its own behind HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from pl_attnedit.errors import UserError

NAME = "bench"  # the model's name on the server


class InProcess:
    """vLLM's `AsyncLLM`; only its workers are other processes."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.numbers = llm, itertools.count()

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        async for out in self.llm.generate({"prompt_token_ids": prompt}, params, str(next(self.numbers))):
            yield len(out.outputs[0].token_ids)

    async def metrics(self) -> str:
        from prometheus_client import generate_latest

        return generate_latest().decode()


@asynccontextmanager
async def in_process(model: str, options: Mapping[str, Any]) -> AsyncIterator[InProcess]:
    """An engine of a model; `options` are those of `vllm.AsyncEngineArgs`."""
    try:
        from prometheus_client import REGISTRY
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise UserError(
            f"vLLM is not installed here ({error}); see `make test-vllm`, or give --vllm COMMAND"
        ) from error
    for collector in {c for name, c in REGISTRY._names_to_collectors.items() if name.startswith("vllm")}:
        REGISTRY.unregister(collector)  # left by the previous engine
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, skip_tokenizer_init=True, **options))
    try:
        yield InProcess(llm)
    finally:
        llm.shutdown()


class OverHTTP:
    """A server, asked by the openai client."""

    def __init__(self, client: Any, port: int) -> None:
        self.client, self.port = client, port

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        chunks = await self.client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            extra_body={"ignore_eos": True},
        )
        tokens = 0
        async for chunk in chunks:
            if chunk.usage is not None and chunk.usage.completion_tokens > tokens:
                tokens = chunk.usage.completion_tokens
                yield tokens

    async def metrics(self) -> str:
        return (await _get(self.port, "/metrics"))[1]


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of `vllm serve`, named as in Python."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


@asynccontextmanager
async def over_http(command: str, model: str, options: Mapping[str, Any]) -> AsyncIterator[OverHTTP]:
    """`command serve MODEL` on a free port, until it answers; ended at the end.

    Raises:
        UserError: it ended before, with what it said last.
    """
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise UserError("the openai client is not installed here: pip install openai") from error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = await asyncio.create_subprocess_exec(
                command, *arguments, *flags(options), stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"--vllm: {command} cannot be started ({error.strerror})") from error
        try:
            async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=3600) as client:
                while (await _get(port, "/health"))[0] != 200:
                    if process.returncode is not None:
                        log.seek(0)
                        raise UserError(f"{command} serve {model} has ended: {last_error(log.read())}")
                    await asyncio.sleep(0.5)
                yield OverHTTP(client, port)
        finally:
            try:
                if process.returncode is None:
                    process.terminate()
                    await asyncio.wait_for(process.wait(), 60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the server and its workers, which may outlive it


async def _get(port: int, path: str) -> tuple[int, str]:
    """Status and text; 0 where nobody answers."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
    except OSError:
        return 0, ""
    return (int(head.split()[1]), body) if head else (0, "")


def vllm_version(command: str | None) -> str:
    """Of the vLLM here, or of a command."""
    if command is None:
        import vllm

        return str(vllm.__version__)
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    return (done.stdout.split() or ["unknown"])[-1]


def last_error(text: str) -> str:
    """The last error that a log names, but for those of processes which waited for the one that failed."""
    errors = re.findall(r"(?:^|\s)([\w.]*(?:Error|Exception): .+)$", text, re.MULTILINE)
    causes = [error for error in errors if "initialization failed" not in error]
    return (causes or errors or text.split("\n")[-2:-1] or ["without a word"])[-1].strip()
