"""`pl-attnedit convert`: a whole conversion from a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pl_attnedit.cli.options import OptionParser, show
from pl_attnedit.conversion.recipe import as_plain, read_recipe, recipe_parser
from pl_attnedit.data import TextDataModule
from pl_attnedit.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = recipe_parser()
    with TemporaryDirectory() as folder:
        file, said = _chosen(arguments, Path(folder))
        config = parser.parse_args([*file, *arguments])
    if not said and (config.target, config.budget, config.context) != (None, None, None):
        raise UserError("target, budget and context: are options of the command, no fields of a recipe")
    plain = as_plain(parser, config)
    recipe, data = read_recipe(parser, config)
    if said:
        written = "" if config.dry_run else f"; {Path(recipe.runs) / recipe.name / 'recipe.yaml'}"
        rank_zero_only(print)(f"convert  {said}{written}", file=sys.stderr)
    if config.dry_run:
        from pl_attnedit.conversion.dry_run import dry_run, dry_run_table

        estimate = dry_run(recipe, TextDataModule(recipe.teacher, **data))
        show(estimate, dry_run_table(estimate), as_json=config.json)
        return 0
    from pl_attnedit.conversion.pipeline import convert

    summary = convert(recipe, data, plain)
    if summary is None:  # a further process of a distributed conversion
        return 0
    show(summary, _found(summary, Path(recipe.runs) / recipe.name), as_json=config.json)
    return 0


def _chosen(arguments: Sequence[str], folder: Path) -> tuple[list[str], str]:
    """Where the target is given without a recipe: one that everything else lies over, as options, and what it is."""
    parser = OptionParser(add_help=False, allow_abbrev=False)
    for name, kind in (("--target", str), ("--teacher", str), ("--budget", float), ("--context", int)):
        parser.add_argument(name, type=kind)
    given, _ = parser.parse_known_args(list(arguments))
    if given.target is None:
        if given.budget is not None or given.context is not None:
            raise UserError("--budget and --context: need --target")
        return [], ""
    for name in ("teacher", "budget"):
        if getattr(given, name) is None:
            raise UserError(f"--{name}: must be given with --target")
    from pl_attnedit.conversion.defaults import chosen_recipe

    recipe, said = chosen_recipe(given.teacher, given.target, given.budget, given.context)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    return ["-c", str(file)], said


def _found(summary: dict[str, Any], folder: Path) -> str:
    return (
        f"KL(teacher||student) {summary['kl_before']:.4f} -> {summary['kl_after_stage1']:.4f} -> "
        f"{summary['kl_after_stage2']:.4f} nats per token, top-1 agreement {summary['top1_after']:.1%}, "
        f"KV budget {summary['kv_budget']:.1%} at {summary['kv_context']} tokens\n"
        f"{folder}: student/, summary.json, report.html; MLflow run {summary['run_id']}"
    )
