"""`bench stage1|stage2`: a training step beside what bounds it and beside plain PyTorch, all in one run.

Ours is `Trainer.fit` of the real stage module, loader and optimiser included. After each window of our steps the others run
a window on the same weights with the same optimiser, so that all see the same machine:

- bound: the same parts alone, the best of eager and compiled layer by layer. Stage 1: the teacher's trunk forward, then each
  new attention forward and backward on stored inputs. Stage 2: teacher forward, student forward and backward, the lm_head
  matrix products, a constant upstream gradient. No loss, no loader.
- naive: two whole passes, all activations kept, full logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from pl_attnedit.distillation.engine.sharding import local
from pl_attnedit.eval.bench.bounds import LayerwiseBound, ModelBound, naive, step_of
from pl_attnedit.eval.bench.flops import matmul_rate, step_flops
from pl_attnedit.eval.bench.step import RandomTokens, StepBench, make_module
from pl_attnedit.eval.bench.timing import spread, synchronize
from pl_attnedit.eval.progress import Progress
from pl_attnedit.memory import current_bytes, peak_bytes, reset_peak


def bench_step(teacher: PreTrainedModel, options: StepBench, progress: Progress | None = None) -> dict[str, Any]:
    """Measures one stage on the teacher's device; the keys are those of the JSON."""
    import pl_attnedit.strategies  # noqa: F401  # registers fsdp2

    began = time.perf_counter()
    device = next(teacher.parameters()).device
    module = make_module(teacher, options)
    measured = Windows(options, device, progress or Progress(), began)
    measured.progress.begin(
        options.repeats * (1 + len(options.others)), lambda: summarise(module, measured, options, device)
    )
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        max_steps=sum(options.batches) // options.accumulate,
        accumulate_grad_batches=options.accumulate,
        callbacks=[measured],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    sequences = options.batch * sum(options.batches) * options.devices
    tokens = RandomTokens(teacher.config.vocab_size, options.seq, sequences)
    trainer.fit(module, DataLoader(tokens, batch_size=options.batch, pin_memory=device.type == "cuda"))
    return measured.progress.result()


class Windows(Callback):
    """Times windows of training steps, and after each a window of every other variant."""

    def __init__(self, options: StepBench, device: torch.device, progress: Progress, began: float) -> None:
        self.options, self.device, self.progress, self.began = options, device, progress, began
        self.first_step = 0.0  # seconds from the teacher's weights to the end of the first step
        self.seconds: dict[str, list[float]] = {"ours": []}
        self.peaks: dict[str, int] = {}
        self.above: dict[str, int] = {}  # peaks above the memory held between steps (weights, optimizer states)
        self.variants: dict[str, Callable[[], None]] = {}
        self.fixed_bytes = 0
        self.communication = 0.0
        self.ranks: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        warmup, timed, _ = self.options.batches
        if batch_idx == 0:
            self.progress.say("ours, warm-up")
        if batch_idx == warmup:
            self.begin("ours")
        if batch_idx == warmup + timed:
            synchronize(self.device)
            self._profiler = torch.profiler.profile()
            self._profiler.__enter__()
            self._profiled_since = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.fixed_bytes:
            self.fixed_bytes = fixed_bytes(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        mine = {"peak_bytes": self.peaks["ours"], "fixed_bytes": self.fixed_bytes}
        every = trainer.strategy.all_gather(torch.tensor(list(mine.values()), dtype=torch.float64, device=self.device))
        self.ranks = [dict(zip(mine, rank.tolist(), strict=True)) for rank in every.view(-1, len(mine))]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        warmup, timed, profiled = self.options.batches
        done = batch_idx + 1 - warmup
        if batch_idx == 0:
            synchronize(self.device)
            self.first_step = time.perf_counter() - self.began
        if profiled and done == timed + profiled:
            self.communication = self.look_at_kernels()
        if done <= 0 or done > timed or done % self.options.window:
            return
        self.end("ours")
        if not self.variants and self.options.others:
            self.prepare(pl_module, trainer.optimizers[0], batch)
        for name, step in self.variants.items():
            self.begin(name)
            for _ in range(self.options.window):
                step()
            self.end(name)
        if done < timed:
            self.begin("ours")

    def begin(self, name: str) -> None:
        self.progress.next(f"{name}, window {len(self.seconds.get(name, ())) + 1}")
        synchronize(self.device)
        reset_peak(self.device)
        self._resident = current_bytes(self.device)
        self._begun = time.perf_counter()

    def end(self, name: str) -> None:
        synchronize(self.device)
        self.seconds.setdefault(name, []).append((time.perf_counter() - self._begun) / self.options.window)
        self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes(self.device))
        self.above[name] = max(self.above.get(name, 0), peak_bytes(self.device) - self._resident)

    def look_at_kernels(self) -> float:
        """Share of the time in which communication kernels run, beside others or alone."""
        synchronize(self.device)
        seconds = time.perf_counter() - self._profiled_since
        self._profiler.__exit__(None, None, None)
        kernels = (event for event in self._profiler.key_averages() if event.key.startswith("ncclDevKernel"))
        return sum(event.self_device_time_total for event in kernels) / 1e6 / seconds

    def prepare(self, module: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
        """The other variants, each warmed up."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper would count these steps
        bound = LayerwiseBound if self.options.stage == "stage1" else ModelBound
        for name in self.options.others:
            self.progress.say(f"{name}, warm-up")
            gradients: Callable[[], None] = partial(naive, module, batch, self.options.stage)
            if name != "naive":
                gradients = bound(module, batch, compiled=name == "bound_compiled")
            step = self.variants[name] = step_of(gradients, module, optimizer)
            for _ in range(self.options.warmup):
                step()


def summarise(module: Any, measured: Windows, options: StepBench, device: torch.device) -> dict[str, Any]:
    step = statistics.median(measured.seconds["ours"])
    bounds = {name: statistics.median(s) for name, s in measured.seconds.items() if name.startswith("bound")}
    tokens = options.batch * options.seq  # per device
    low = "bf16" in options.precision
    rate = matmul_rate(device, torch.bfloat16 if low else torch.float32)
    flops = step_flops(module.teacher, module.student, stage=options.stage, trained=options.train, seq_len=options.seq)
    result: dict[str, Any] = {
        "step_ms": 1e3 * step,
        "bound_ms": 1e3 * min(bounds.values()) if bounds else None,
        "step_over_bound": step / min(bounds.values()) if bounds else None,
        "tokens_per_s": tokens / step,
        "flop_utilisation": flops * tokens / step / rate,
        "seconds_to_first_step": measured.first_step,
        "peak_bytes": measured.peaks["ours"],
        "weights_gradients_optimizer_bytes": measured.fixed_bytes,
        "working_bytes": measured.above["ours"] - gradient_bytes(module),
        "matmul_flops": rate,
        "flops_per_token": flops,
        "variants": {name: spread(s) | {"peak_bytes": measured.peaks[name]} for name, s in measured.seconds.items()},
        "machine": machine(device),
    }
    if measured.ranks and options.devices > 1:
        result["ranks"] = measured.ranks
        result["communication_share"] = measured.communication
    if "naive" in measured.seconds:
        result["naive_over_step"] = statistics.median(measured.seconds["naive"]) / step
    return result


def fixed_bytes(module: Any) -> int:
    """Bytes in this process of all weights, and of gradients and AdamW's two moments of what trains."""
    weights = {id(p): p for model in (module.teacher, module.student) for p in model.parameters()}
    here = (p for p in weights.values() if p.device == module.device)
    return bytes_here(here) + 3 * gradient_bytes(module)


def gradient_bytes(module: Any) -> int:
    """Bytes in this process of the gradients of what trains."""
    return bytes_here(p for p in module.parameters() if p.requires_grad and p.device == module.device)


def bytes_here(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, of sharded ones this process's part."""
    return sum(part.numel() * part.element_size() for part in map(local, tensors))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"device": name, "torch": torch.__version__}


def step_table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [f"{'variant':16} {'median ms':>10} {'min':>9} {'max':>9} {'peak GB':>8}"]
    for name, found in result["variants"].items():
        times = " ".join(f"{found[key]:{width}.1f}" for key, width in (("median_ms", 10), ("min_ms", 9), ("max_ms", 9)))
        rows.append(f"{name:16} {times} {found['peak_bytes'] / 1e9:8.2f}")
    if "ranks" in result:
        peaks = ", ".join(f"{rank['peak_bytes'] / 1e9:.2f}" for rank in result["ranks"])
        rows.append(f"per device: {result['scaling_efficiency']:.1%} of the tokens/s of one alone, peak GB {peaks},")
        rows.append(f"communication runs in {result['communication_share']:.1%} of the time")
    ratio = result["step_over_bound"]
    rows.append(
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['flop_utilisation']:.0%} of the measured matrix product rate"
        + (f", step over bound {ratio:.2f}" if ratio else "")
        + f", on {result['machine']['device']}"
    )
    rows.append(f"the first step ended {result['seconds_to_first_step']:.0f} s after the teacher's weights were there")
    return "\n".join(rows)
