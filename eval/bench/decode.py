"""`bench decode`: a student's prefill, decode and largest batch beside its teacher's, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from pl_attnedit.eval.bench.stages import machine
from pl_attnedit.eval.efficiency import largest_batch, measure_efficiency


def bench_decode(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    budget_bytes: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`efficiency`: the rows of `measure_efficiency`, which takes `settings`; `ratios`: student over teacher by context and
    batch; `largest_batch`: rows of both models by context, where a budget is given; `machine`.
    """
    rows = measure_efficiency(teacher, student, contexts=contexts, batches=batches, **settings)
    largest = [
        {"model": name, **largest_batch(model, context, budget_bytes)}
        for context in contexts
        for name, model in {"teacher": teacher, "student": student}.items()
        if budget_bytes is not None
    ]
    ratios = [_ratios(of_teacher, of_student) for of_teacher, of_student in zip(rows[::2], rows[1::2])]
    return {"efficiency": rows, "ratios": ratios, "largest_batch": largest, "machine": machine(teacher.device)}


def _ratios(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    found = {name: teacher[name] for name in ("context", "batch")}
    found["cache_bytes_per_token"] = student["cache_bytes_per_token"] / teacher["cache_bytes_per_token"]
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        found[name] = student[name]["median"] / teacher[name]["median"]
    return found


def decode_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    table: list[tuple[str, ...]] = [
        ("context", "batch", "model", "prefill tokens/s", "decode tokens/s [quartiles]", "cache B/token", "peak GB")
    ]
    rows, ratios = result["efficiency"], result["ratios"]
    for of_teacher, of_student, ratio in zip(rows[::2], rows[1::2], ratios):
        place = (f"{ratio['context']:,}", f"{ratio['batch']:,}")
        table += [(*place, *_cells(row)) for row in (of_teacher, of_student)]
        over = (
            f"{ratio[name]:.2f}" for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes_per_token")
        )
        table.append((*place, "student / teacher", *over, ""))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    lines += [
        f"largest batch in {row['budget_bytes'] / 1e9:g} GB at {row['context']:,} tokens: {row['model']} {row['batch']:,} "
        + ("(run)" if row["run"] else "(added up from tensors' sizes, not run)")
        for row in result["largest_batch"]
    ]
    return "\n".join([*lines, f"decode: {rows[0]['decode']}, on {result['machine']['device']}"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    decode = row["decode_tokens_per_s"]
    return (
        row["model"],
        f"{row['prefill_tokens_per_s']['median']:,.0f}",
        f"{decode['median']:,.1f} [{decode['low']:,.1f}, {decode['high']:,.1f}]",
        f"{row['cache_bytes_per_token']:,.0f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
    )
