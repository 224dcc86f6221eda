"""`pl-attnedit convert`: a whole conversion from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pl_attnedit.cli.options import show
from pl_attnedit.conversion.dry_run import dry_run, dry_run_table
from pl_attnedit.conversion.pipeline import convert
from pl_attnedit.conversion.recipe import as_plain, read_recipe, recipe_parser
from pl_attnedit.data import TextDataModule


def main(arguments: Sequence[str]) -> int:
    parser = recipe_parser()
    config = parser.parse_args(list(arguments))
    plain = as_plain(parser, config)
    recipe, data = read_recipe(parser, config)
    if config.dry_run:
        estimate = dry_run(recipe, TextDataModule(recipe.teacher, **data))
        show(estimate, dry_run_table(estimate), as_json=config.json)
        return 0
    summary = convert(recipe, data, plain)
    if summary is None:  # a further process of a distributed conversion
        return 0
    show(summary, _found(summary, Path(recipe.runs) / recipe.name), as_json=config.json)
    return 0


def _found(summary: dict[str, Any], folder: Path) -> str:
    return (
        f"KL(teacher||student) {summary['kl_before']:.4f} -> {summary['kl_after_stage1']:.4f} -> "
        f"{summary['kl_after_stage2']:.4f} nats per token, top-1 agreement {summary['top1_after']:.1%}, "
        f"KV budget {summary['kv_budget']:.1%} at {summary['kv_context']} tokens\n"
        f"{folder}: student/, summary.json, report.html; MLflow run {summary['run_id']}"
    )
