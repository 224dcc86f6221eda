"""`bench decode`: prefill, decode and largest batch of students beside those of their teacher, in one run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from pl_attnedit.attention import TargetConfig
from pl_attnedit.eval.bench.stages import machine
from pl_attnedit.eval.efficiency import Runs, efficiency_rows, largest_batch, measure_efficiency
from pl_attnedit.eval.progress import Progress
from pl_attnedit.eval.report.formatting import aligned
from pl_attnedit.modeling.plan import EditPlan


def bench_decode(
    models: Mapping[str, PreTrainedModel],
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    repeats: int = 5,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`models` are named, the teacher first.

    Returns:
        `efficiency`: the rows of `measure_efficiency`, which takes `settings`; `ratios`: each student over the teacher by
        context and batch; `largest_batch`: rows of all models by context, where a budget is given; `machine`.
    """
    runs: Runs = {}
    largest: list[dict[str, Any]] = []
    device = next(iter(models.values())).device

    def result() -> dict[str, Any]:
        rows = efficiency_rows(runs)
        ratios = [_ratios(place[0], of_student) for place in _places(rows) for of_student in place[1:]]
        return {"efficiency": rows, "ratios": ratios, "largest_batch": largest, "machine": machine(device)}

    budgets = [] if budget_bytes is None else [budget_bytes]
    of_each = len(contexts) * (len(batches) * repeats + len(budgets))
    progress = (progress or Progress()).begin(len(models) * of_each, result)
    settings |= {"repeats": repeats, "runs": runs, "progress": progress}
    measure_efficiency(models, contexts=contexts, batches=batches, **settings)
    for context, (name, model), budget in itertools.product(contexts, models.items(), budgets):
        progress.next(f"{name}, {context:,} tokens, largest batch")
        largest.append({"model": name, **largest_batch(model, context, budget)})
    return result()


def student_name(plan: EditPlan) -> str:
    """Its targets with what they state, and its pattern unless all layers are alike: mla 96+32; gate_swa 64, SSSF."""
    used = {letter: _target_name(target) for letter, target in plan.targets.items() if letter in plan.letters}
    names = list(used.values()) if len(used) == 1 else [f"{letter} = {name}" for letter, name in used.items()]
    return ", ".join([*names, *([plan.pattern] if len(plan.pattern) > 1 or not used else [])])


def _target_name(target: TargetConfig) -> str:
    fields = {field: getattr(target, field.name) for field in dataclasses.fields(target)}
    needed = [str(value) for field, value in fields.items() if field.default is dataclasses.MISSING]
    changed = [
        f"{field.name} {value}"
        for field, value in fields.items()
        if field.default is not dataclasses.MISSING and value != field.default
    ]
    return ", ".join([f"{target.type} {'+'.join(needed)}".rstrip(), *changed])


def _places(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """The rows of all models at one context and batch, or at one context."""
    count = len({row["model"] for row in rows})
    return (rows[start : start + count] for start in range(0, len(rows), count or 1))


def _ratios(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    found = {name: student[name] for name in ("model", "context", "batch")}
    found["cache_bytes_per_token"] = student["cache_bytes_per_token"] / teacher["cache_bytes_per_token"]
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        found[name] = student[name]["median"] / teacher[name]["median"]
    return found


def decode_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    table: list[tuple[str, ...]] = [
        ("context", "batch", "model", "prefill tokens/s", "decode tokens/s [quartiles]", "cache B/token", "peak GB")
    ]
    ratios = iter(result["ratios"])
    for rows in _places(result["efficiency"]):
        place = (f"{rows[0]['context']:,}", f"{rows[0]['batch']:,}")
        table += [(*place, *_cells(row)) for row in rows]
        for ratio in itertools.islice(ratios, len(rows) - 1):
            shown = ("prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes_per_token")
            over = (f"{ratio[name]:.2f}" for name in shown)
            table.append((*place, f"{ratio['model']} / {rows[0]['model']}", *over, ""))
    lines = aligned(table)
    lines += [
        f"largest batch in {rows[0]['budget_bytes'] / 1e9:g} GB at {rows[0]['context']:,} tokens: "
        + "; ".join(f"{row['model']}: {row['batch']:,}" for row in rows)
        + (" (run)" if rows[0]["run"] else " (added up from tensors' sizes, not run)")
        for rows in _places(result["largest_batch"])
    ]
    return "\n".join([*lines, f"decode: {result['efficiency'][0]['decode']}, on {result['machine']['device']}"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    decode = row["decode_tokens_per_s"]
    return (
        row["model"],
        f"{row['prefill_tokens_per_s']['median']:,.0f}",
        f"{decode['median']:,.1f} [{decode['low']:,.1f}, {decode['high']:,.1f}]",
        f"{row['cache_bytes_per_token']:,.0f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
    )
