"""What a recipe would train, cache, hold and take, from the teacher's config alone: no weights, no text, nothing written."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from pl_attnedit.conversion.checks import check_devices, check_recipe, world_size
from pl_attnedit.conversion.recipe import Recipe, StageRecipe
from pl_attnedit.data import Phase, TextDataModule
from pl_attnedit.distillation.settings import frozen_dtype, trained_dtype
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.bench.flops import matmul_rate, mixture_of, step_flops
from pl_attnedit.eval.bench.memory import StageMemory, Step, init_memory, stage_memory, trained_parameters
from pl_attnedit.eval.report.formatting import count, duration, percent
from pl_attnedit.modeling import kv
from pl_attnedit.modeling.hf import edited_config
from pl_attnedit.serving.checks import check_config
from pl_attnedit.serving.memory import BLOCK, held_bytes, layers_of, state_block
from pl_attnedit.strategies.fsdp2 import check_shard_over

CONTEXTS = (1024, 8192, 32768)  # tokens; the model's limit is added
# Share of a matrix product's rate that training reaches on a GPU. Measured on one and two H200, both stages
# (results/bench_one_gpu.json, bench_two_gpus.json): Qwen3-8B 0.63 to 0.73, SmolLM2-135M 0.26 to 0.39.
EFFICIENCY = 0.65
SMALL_EFFICIENCY, SMALL = 0.35, 1e9  # teachers of fewer parameters
MIXTURE_EFFICIENCY = 0.5  # Qwen3-30B-A3B on one H200: 0.52 in stage 1, 0.50 in stage 2


def dry_run(recipe: Recipe, data: TextDataModule) -> dict[str, Any]:
    """The estimate as plain data; `UserError` for a recipe that does not fit its teacher. `data` is not opened."""
    config, plan = check_recipe(recipe)
    devices = world_size(recipe.trainer)
    accelerator = recipe.trainer.get("accelerator")
    check_devices(recipe, accelerator if accelerator in ("cpu", "npu") else "cuda", devices)
    limit = config.max_position_embeddings
    if data.seq_len > limit:
        raise invalid("seq_len", data.seq_len, f"must be at most {limit}, the context of the model")
    frozen = frozen_dtype(recipe.trainer.get("precision"), recipe.dtype)
    dtype = trained_dtype(frozen)
    teacher, student = kv.on_meta(config, frozen), kv.on_meta(edited_config(config, plan), dtype)
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parameters = sum(p.numel() for p in teacher.parameters())
    mixture = any(mixture_of(layer) for layer in teacher.model.layers)
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "teacher": recipe.teacher,
        "teacher_parameters": parameters,
        "pattern": plan.pattern,
        "layers": len(plan.letters),
        "edited_layers": len(plan.edited_layers),
        "kv": _kv(teacher, kv.on_meta(student.config, frozen), limit),
        "device_here": _name(here),
        "matmul_flops": matmul_rate(here, torch.bfloat16 if _low(recipe) else dtype),
        "efficiency": MIXTURE_EFFICIENCY if mixture else SMALL_EFFICIENCY if parameters < SMALL else EFFICIENCY,
        "devices": devices,
        "stages": {},
        "memory": {},
    }
    result["memory"]["init"] = init_memory(teacher, student, recipe.init, data.batch_size, data.seq_len)
    for name, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        phases = stage.all_phases(data.seq_len, data.batch_size)
        itemsize = 2 if _low(recipe) else dtype.itemsize
        steps = [_step(name, stage, phase, recipe, data.respect_documents, devices, itemsize) for phase in phases]
        memory = [stage_memory(teacher, student, step) for step in steps]
        rate = result["matmul_flops"] * result["efficiency"] * devices
        work = [_work(teacher, student, stage, *each, rate) for each in zip(phases, steps)]
        result["memory"][name] = max(memory, key=lambda found: found.total)
        result["stages"][name] = {
            "trained_parameters": sum(p.numel() for p in trained_parameters(student, steps[-1])),
            **{figure: sum(phase[figure] for phase in work) for figure in ("steps", "tokens", "flops", "seconds")},
            "phases": [phase | {"memory": found.total} for phase, found in zip(work, memory)],
        }
    return result


def _work(teacher: Any, student: Any, stage: StageRecipe, phase: Phase, step: Step, rate: float) -> dict[str, Any]:
    """Tokens, floating point operations and seconds of a phase, at `rate` operations per second on all devices."""
    tokens = phase.steps * stage.accumulate * step.devices * step.tokens
    flops = tokens * step_flops(
        teacher,
        student,
        stage=step.stage,
        trained=step.trained,
        seq_len=phase.seq_len,
        block_loss=stage.options.get("supervise") == "block",
        train_layers=step.train_layers,
    )
    return asdict(phase) | {"tokens": tokens, "flops": flops, "seconds": flops / rate}


def _kv(teacher: Any, student: Any, limit: int) -> list[dict[str, Any]]:
    """Cached bytes of one sequence, by context: in Hugging Face's caches, and in the blocks of vLLM, or why it refuses."""
    rows = []
    for context in sorted({*(c for c in CONTEXTS if c < limit), limit}):
        found = {"teacher": sum(kv.held_bytes(teacher, context)), "student": sum(kv.held_bytes(student, context))}
        try:
            check_config(student.config)
            vllm: dict[str, Any] = {
                name: held_bytes(model.config, context, model.dtype.itemsize)
                for name, model in {"teacher": teacher, "student": student}.items()
            }
            vllm["block"] = state_block(layers_of(student.config), BLOCK, student.dtype.itemsize)
        except UserError as error:
            vllm = {"refused": str(error)}
        rows.append({"context": context, **found, "budget": found["student"] / found["teacher"], "vllm": vllm})
    return rows


def _name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return module.get_device_name() if hasattr(module, "get_device_name") else device.type


def _step(
    name: str, stage: StageRecipe, phase: Phase, recipe: Recipe, documents: bool, devices: int, itemsize: int
) -> Step:
    options = stage.options
    layers = options.get("train_layers")
    return Step(
        stage=name,
        tokens=phase.batch_size * phase.seq_len,
        seq=phase.seq_len,
        documents=documents,
        trained=options.get("train", "attention"),
        train_layers=None if layers is None else tuple(layers),
        feature_weight=float(options.get("feature_weight", 0.0)),
        activation_checkpointing=bool(options.get("activation_checkpointing", False)),
        devices=devices,
        shards=_shards(recipe.trainer.get("strategy"), devices),
        itemsize=itemsize,
        device_type="cpu" if recipe.trainer.get("accelerator") == "cpu" else "cuda",
    )


def _shards(strategy: Any, devices: int) -> int:
    """How many devices share one copy of everything."""
    if "fsdp" not in str(strategy):
        return 1
    over = (strategy.get("init_args") or {}).get("shard_over") if isinstance(strategy, dict) else None
    check_shard_over(over, devices)
    return over or devices


def _low(recipe: Recipe) -> bool:
    """Whether arithmetic is in bfloat16."""
    return str(recipe.trainer.get("precision", "")).startswith("bf16")


def _budget(found: dict[str, Any]) -> str:
    """Cells of a stage or of one of its phases."""
    work = f"{found['flops'] / 1e15:10,.3g}"
    return f"{found['steps']:5}   {count(found['tokens']):>8} {work}   {duration(found['seconds'])}"


def _served(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of what vLLM holds."""
    if refused := rows[0]["vllm"].get("refused"):
        return [f"not served by vLLM as it is: {refused}"]
    lines = ["served by vLLM             bytes per token           sequences in 1 GB"]
    blocks = ", ".join(map(str, sorted({BLOCK, rows[0]["vllm"]["block"]})))
    lines += [f"{f'blocks of {blocks} tokens':26}teacher     student     teacher     student     ratio"]
    for row in rows:
        teacher, student = row["vllm"]["teacher"], row["vllm"]["student"]
        bytes_ = f"{teacher / row['context']:10,.0f}  {student / row['context']:10,.0f}"
        sequences = f"{1e9 / teacher:10,.2f}  {1e9 / student:10,.2f}"
        lines.append(f"{row['context']:16,} tokens  {bytes_}  {sequences}  {teacher / student:7.2f}x")
    return lines


def dry_run_table(result: dict[str, Any]) -> str:
    """The estimate as text."""
    stages = result["stages"]
    lines = [
        f"{result['recipe']}: {result['teacher']}, {count(result['teacher_parameters'])} parameters; pattern "
        f"{result['pattern']}, {result['edited_layers']} of {result['layers']} layers edited",
        "",
        "KV cache of one sequence   teacher GB   student GB   KV budget",
    ]
    for row in result["kv"]:
        sizes = f"{row['teacher'] / 1e9:10.3f}   {row['student'] / 1e9:10.3f}"
        lines.append(f"{row['context']:16,} tokens   {sizes}   {percent(row['budget']):>9}")
    lines += ["", *_served(result["kv"]), "", "         trained parameters   steps     tokens      PFLOP   time here"]
    for name, stage in stages.items():
        trained = count(stage["trained_parameters"])
        lines.append(f"{name}   {trained:>18}   {_budget(stage)}")
        if len(stage["phases"]) > 1:
            for phase in stage["phases"]:
                of = f"{phase['batch_size']} x {phase['seq_len']:,}"
                lines.append(f"{of:>27}   {_budget(phase)}, {phase['memory'] / 1e9:.2f} GB")
    rate = f"{result['efficiency']:.0%} of the {result['matmul_flops'] / 1e12:.3g} TFLOP/s"
    lines += [
        f"time on {result['devices']} x {result['device_here']}, if each reaches {rate} that a matrix product "
        "reaches on this machine now; init, validation and evaluation come on top",
        "",
        "GB per device   weights   gradients   optimizer   gathered   activations     total",
    ]
    memories: dict[str, StageMemory] = {name: found for name, found in result["memory"].items() if found is not None}
    widths = {"weights": 10, "gradients": 12, "optimizer": 12, "gathered": 11, "activations": 14, "total": 10}
    for name, memory in memories.items():
        cells = "".join(f"{getattr(memory, field) / 1e9:{width}.2f}" for field, width in widths.items())
        lines.append(f"{name:13}{cells}")
    lines += [
        "gathered and activations are estimates, their formula is in pl_attnedit/eval/bench/memory.py; an init from text is "
        "not sharded, its statistics stand under activations",
    ]
    return "\n".join(lines)
