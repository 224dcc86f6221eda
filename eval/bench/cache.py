"""Bytes of real caches beside what the formulas promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from pl_attnedit.errors import invalid
from pl_attnedit.eval.progress import Progress
from pl_attnedit.eval.report.formatting import aligned
from pl_attnedit.modeling import EditedModelMixin
from pl_attnedit.modeling.kv import fill_cache, promised_bytes
from pl_attnedit.teachers import layer_specs

CONTEXTS = (1024, 8192, 32768)


def bench_cache(
    models: Mapping[str, PreTrainedModel], contexts: Sequence[int] = CONTEXTS, progress: Progress | None = None
) -> dict[str, Any]:
    """Allocates a cache for each model and context, fills it, and measures its storage right after prefill and a step later.

    Returns:
        `rows`: one per model, context and kind of layer (its letter in the plan), with bytes per token and layer and those
        of the formula; `budgets`: bytes of the whole model per token a step later, and the share of the first model's;
        `agree`: whether every layer's bytes were exactly the promised ones; a teacher's own windows a step later, since
        Hugging Face's keep a prompt whole at first.

    Raises:
        UserError: a context below 1.
    """
    for context in contexts:
        if context < 1:
            raise invalid("contexts", context, "must be at least 1 token")
    rows: list[dict[str, Any]] = []
    budgets: list[dict[str, Any]] = []

    progress = (progress or Progress()).begin(
        len(contexts) * len(models),
        lambda: {"rows": rows, "budgets": budgets, "agree": all(row["agree"] for row in rows)},
    )
    for context in contexts:
        whole: float | None = None
        for name, model in models.items():
            progress.next(f"{name}, {context:,} tokens")
            measured = list(fill_cache(model, context))
            promised = [promised_bytes(model, context), promised_bytes(model, context + 1)]
            rows += [
                {"model": name, "context": context, **row} for row in _by_letter(model, context, measured, promised)
            ]
            per_token = sum(measured[1]) / (context + 1)
            whole = per_token if whole is None else whole
            budgets.append(
                {"model": name, "context": context, "bytes_per_token": per_token, "kv_budget": per_token / whole}
            )
    return progress.result()


def _by_letter(
    model: PreTrainedModel, context: int, measured: list[list[int]], promised: list[list[int]]
) -> list[dict[str, Any]]:
    letters = list(model.edit_plan.letters if isinstance(model, EditedModelMixin) else "F" * len(measured[0]))
    exact = dict.fromkeys(letters, 0)  # from which moment on the formula holds
    for index, spec in enumerate(layer_specs(model.config)):
        if letters[index] == "F" and (spec is None or spec.window):
            letters[index] = "F, no attention" if spec is None else f"F, window {spec.window}"
            # Hugging Face's window layer keeps a prompt whole at first
            exact[letters[index]] = 2 if spec is None else 1
    rows = []
    for letter in dict.fromkeys(letters):
        layers = [index for index, found in enumerate(letters) if found == letter]

        def mean(of_layers: list[int], tokens: int, layers: list[int] = layers) -> float:
            return sum(of_layers[index] for index in layers) / len(layers) / tokens

        rows.append(
            {
                "layers": letter,
                "count": len(layers),
                "after_prefill": mean(measured[0], context),
                "formula": mean(promised[0], context),
                "one_step_later": mean(measured[1], context + 1),
                "formula_one_step_later": mean(promised[1], context + 1),
                "agree": all(
                    m[index] == p[index] for m, p in list(zip(measured, promised))[exact[letter] :] for index in layers
                ),
            }
        )
    return rows


def cache_table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    table = [("model", "context", "layers", "after prefill", "formula", "one step later", "formula", "agree")] + [
        (
            row["model"],
            f"{row['context']:,}",
            f"{row['count']} {row['layers']}",
            *(f"{row[key]:,.2f}" for key in ("after_prefill", "formula", "one_step_later", "formula_one_step_later")),
            "to the byte" if row["agree"] else "NO",
        )
        for row in result["rows"]
    ]
    lines = ["Bytes per token and layer (F = full layer, as in the teacher)"]
    lines += aligned(table)
    lines += [
        f"{budget['model']} at {budget['context']:,} tokens: {budget['bytes_per_token']:,.0f} bytes per token, "
        f"KV budget {budget['kv_budget']:.1%}"
        for budget in result["budgets"]
    ]
    return "\n".join(lines)
