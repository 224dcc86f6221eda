"""Speed and memory of prefill and decode: a teacher and its students in turn, in one process.

Prefill runs at most `prefill_tokens` tokens a forward pass, a larger batch in several passes, and makes logits of the last
token only; its seconds are the time to the first token of the whole batch.

Decode adds a greedy token to every sequence of a batch whose cache holds `context` tokens. Room for that token is allocated
ahead, as engines that serve do, and each step writes to the same place (`hold`). So the context stays what is stated, and
no step copies the cache, which HF's `DynamicCache` does in every layer. On CUDA the step is a CUDA graph: launched one by
one, the kernels of a small model, teacher or student, run at the pace of Python, whatever its attention costs.

Memory is that of one model, as if it were alone: its weights and whatever its run allocates above what was there before.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from pl_attnedit.errors import invalid
from pl_attnedit.eval.bench.flops import mixture_of
from pl_attnedit.eval.bench.timing import synchronize
from pl_attnedit.eval.decoding import WARMUP_STEPS, Decoder, prefill
from pl_attnedit.eval.progress import Progress
from pl_attnedit.memory import current_bytes, peak_bytes, reset_peak
from pl_attnedit.modeling.kv import WithoutScores, cache_bytes


def measure_efficiency(
    models: Mapping[str, PreTrainedModel],
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    new_tokens: int = 32,
    repeats: int = 5,
    prefill_tokens: int = 32768,
    cuda_graph: bool = True,
    runs: Runs | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Speed and memory of models, in eval mode on the devices where they are, for every context and batch.

    A repeat is a run of each model, in turn: prefill, then `new_tokens` decode steps; a first one warms up.

    Args:
        models: by the name that their rows get.
        contexts: tokens in the cache of each sequence.
        batches: sequences.
        new_tokens: decode steps that are timed together.
        prefill_tokens: most tokens of one forward pass of the prefill (at least one sequence's).
        cuda_graph: False = launch each kernel of a decode step from Python, on CUDA too.
        runs: gets each run as it ends, for `efficiency_rows`.
        progress: of a caller that measures more.

    Returns:
        A row for each context, batch and model: `cache_bytes_per_token` of the real cache after the prefill;
        `prefill_tokens_per_s`, `decode_tokens_per_s`, `first_token_s`, each with median and quartiles `low` and `high` over
        the repeats; `peak_bytes` of weights, caches and activations, None on a CPU, where allocators keep what is freed;
        `decode`, "cuda graph" or "eager".

    Raises:
        UserError: a number below 1, a context that leaves no room for a token within a model's limit, a batch that does
            not fit the device.
    """
    single = {"new_tokens": [new_tokens], "repeats": [repeats], "prefill_tokens": [prefill_tokens]}
    _check(models, contexts=contexts, batches=batches, **single)
    runs = {} if runs is None else runs
    progress = progress or Progress().begin(len(contexts) * len(batches) * repeats * len(models), dict)
    for context, batch, repeat in itertools.product(contexts, batches, range(repeats + 1)):
        for name, model in models.items():
            what = f"{name}, {context:,} tokens, batch {batch:,}"
            if repeat:
                progress.next(f"{what}, run {repeat}")
            else:
                progress.say(f"{what}, warm-up")
            try:
                run = _run(model, context, batch, new_tokens, prefill_tokens, cuda_graph)
            except torch.OutOfMemoryError as error:
                problem = f"of {context} tokens each: {name} runs out of the device's memory"
                raise invalid("batches", batch, problem) from error
            runs.setdefault((name, context, batch), []).append(run)
    return efficiency_rows(runs)


def efficiency_rows(runs: Runs) -> list[dict[str, Any]]:
    """The rows of `measure_efficiency`, of what has run after its warm-up."""
    return [
        {"model": name, "context": context, "batch": batch, **_summary(found[1:], context, batch)}
        for (name, context, batch), found in runs.items()
        if len(found) > 1
    ]


def largest_batch(model: PreTrainedModel, context: int, budget_bytes: int) -> dict[str, Any]:
    """The largest batch of which one decode step fits the budget: weights, caches of `context` tokens, activations.

    On CUDA the step is really run, at the batch found and at the next one, and the allocator's highest figure counts
    (without the CUDA context and fragmentation); a batch for which the device runs out of memory, beside whatever else is
    there, does not fit. Elsewhere it runs on the meta device, whose tensors have sizes and no content, and what is alive
    at a time is added up, with kernels of attention that allocate no more than their output.

    Returns:
        `context`, `budget_bytes`, `batch` (0 where not even one fits), `peak_bytes` at that batch (None for 0), and `run`:
        whether it was really run.

    Raises:
        UserError: a context beyond the model's limit, a budget beyond the device's memory, off CUDA a mixture of experts
            in another dtype than bfloat16.
    """
    _check({"model": model}, contexts=[context], budget_bytes=[budget_bytes])
    run = model.device.type == "cuda"
    if run and budget_bytes > (total := torch.cuda.mem_get_info(model.device)[1]):
        raise invalid("budget_bytes", budget_bytes, f"must be at most the device's memory of {total} bytes")
    subject = model if run else _without_content(model)
    peaks: dict[int, float] = {}

    def peak(batch: int) -> float:
        if batch not in peaks:
            try:
                peaks[batch] = decode_peak(subject, context, batch)
            except torch.OutOfMemoryError:
                peaks[batch] = math.inf
            if peaks[batch] == math.inf:  # only now, as the error's frames held what the attempt had allocated
                torch.cuda.empty_cache()
        return peaks[batch]

    low, high = 1, 2  # where the peak is a straight line from one to the other, the next guess is right
    while peak(low) <= budget_bytes and (peak(high) <= budget_bytes or high - low > 1):
        if peak(high) == math.inf:  # no line to follow
            guess = (low + high) // 2
        else:
            each = max((peak(high) - peak(low)) / (high - low), 1)
            guess = low + int((budget_bytes - peak(low)) / each)
        if peak(high) <= budget_bytes:
            low, high = high, max(guess, high + 1)
        else:
            guess = min(max(guess, low + 1), high - 1)
            low, high = (guess, high) if peak(guess) <= budget_bytes else (low, guess)
    batch = low if peak(low) <= budget_bytes else 0
    return {
        "context": context,
        "budget_bytes": budget_bytes,
        "batch": batch,
        "peak_bytes": peaks[batch] if batch else None,
        "run": run,
    }


@torch.no_grad()
def decode_peak(model: PreTrainedModel, context: int, batch: int) -> int:
    """Highest memory of a decode step, in bytes: weights, the caches with room for the token, activations.

    On the meta device these are added up; on an accelerator the step runs.
    """
    meta = model.device.type == "meta"
    before = 0 if meta else current_bytes(model.device)
    cache = prefill(model, torch.zeros(1, context, dtype=torch.long, device=model.device), context)[0]
    decoder = Decoder(model, cache, batch)
    if meta:
        with WithoutScores(), _AliveBytes() as alive:
            decoder.step()
        return weights_bytes(model) + cache_bytes(cache) + alive.peak
    reset_peak(model.device)
    decoder.step()
    synchronize(model.device)
    return weights_bytes(model) + peak_bytes(model.device) - before


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class _Run:
    prefill_seconds: float
    decode_seconds: float  # of each step
    cache_bytes: int
    peak_bytes: int | None
    decode: str


Runs = dict[tuple[str, int, int], list[_Run]]  # of a model, context and batch


@torch.no_grad()
def _run(
    model: PreTrainedModel, context: int, batch: int, new_tokens: int, prefill_tokens: int, cuda_graph: bool
) -> _Run:
    device = model.device
    ids = torch.randint(model.config.vocab_size, (batch, context), device=device)
    before = current_bytes(device)
    synchronize(device)
    reset_peak(device)
    begin = time.perf_counter()
    caches = prefill(model, ids, prefill_tokens)
    synchronize(device)
    prefilled = time.perf_counter() - begin
    cached = sum(map(cache_bytes, caches))
    cache = caches[0]
    del caches  # of other sequences: those of the first one are as long
    decoder = Decoder(model, cache, batch)
    graph = cuda_graph and device.type == "cuda"
    if graph:
        decoder.capture()
    for _ in range(WARMUP_STEPS):
        decoder()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(new_tokens):
        decoder()
    synchronize(device)
    decode = (time.perf_counter() - begin) / new_tokens
    peak = None if device.type == "cpu" else weights_bytes(model) + peak_bytes(device) - before
    return _Run(prefilled, decode, cached, peak, "cuda graph" if graph else "eager")


def _summary(runs: Sequence[_Run], context: int, batch: int) -> dict[str, Any]:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "cache_bytes_per_token": runs[0].cache_bytes / (batch * context),
        "prefill_tokens_per_s": _spread([batch * context / run.prefill_seconds for run in runs]),
        "decode_tokens_per_s": _spread([batch / run.decode_seconds for run in runs]),
        "first_token_s": _spread([run.prefill_seconds for run in runs]),
        "peak_bytes": max(peaks) if peaks else None,
        "decode": runs[0].decode,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high}


def _check(models: Mapping[str, PreTrainedModel], **numbers: Sequence[int]) -> None:
    for name, values in numbers.items():
        for value in values:
            if value < 1:
                raise invalid(name, value, "must be at least 1")
    for model in models.values():
        limit = model.config.max_position_embeddings
        for context in numbers["contexts"]:
            if context >= limit:
                raise invalid("contexts", context, f"must be below the model's limit of {limit} tokens")


def _without_content(model: PreTrainedModel) -> PreTrainedModel:
    if model.dtype != torch.bfloat16 and any(mixture_of(layer) for layer in model.model.layers):
        raise invalid("dtype", model.dtype, "without content a mixture of experts runs in torch.bfloat16 alone")
    with torch.device("meta"):
        return type(model)(model.config).to(model.dtype).eval()  # type: ignore[arg-type]


class _AliveBytes(TorchDispatchMode):
    """The highest sum of bytes that results of operations hold at a time; views and in-place results hold nothing new."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in {s._cdata: s for s in _storages(result) if s._cdata not in given}.values():
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
