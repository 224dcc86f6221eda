"""A recipe from a teacher, a target and a KV budget alone: the shipped recipe for such a target, teacher and device, with
the pattern or the latent width that keeps the budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pl_attnedit.attention import target_from_dict
from pl_attnedit.config_files import read_yaml
from pl_attnedit.errors import invalid
from pl_attnedit.eval.fidelity.untrained import cached_by_letter
from pl_attnedit.modeling.kv import held_bytes, kv_context, on_meta
from pl_attnedit.modeling.plan import FULL
from pl_attnedit.modeling.ranking import Sensitivity, kv_share, spread_evenly
from pl_attnedit.teachers import attention_spec, editable_layers
from pl_attnedit.teachers.sources.resolve import teacher_config

CONFIGS = Path(__file__).parents[1] / "configs"
# by target: on a CPU, for a teacher of fewer parameters than SMALL, for any other
RECIPES = {
    "gate_swa": ("quickstart", "recipes/smollm2_gate_swa", "recipes/qwen3_8b_gate_swa"),
    "mla": ("quickstart_mla", "recipes/smollm2_mla", "recipes/qwen3_8b_mla"),
}
SMALL = 1e9
RANKS = 8  # a latent width is a multiple of it


def chosen_recipe(teacher: str, target: str, budget: float, context: int | None = None) -> tuple[dict[str, Any], str]:
    """The fields of a recipe for the devices of this machine, and a line that says what was chosen.

    Args:
        target: gate_swa or mla.
        budget: cached bytes, student / teacher.
        context: tokens at which the budget is kept; default 32k, or the teacher's limit.

    Raises:
        UserError: no such target, a budget that cannot be kept, a teacher that cannot be converted.
    """
    if target not in RECIPES:
        raise invalid("--target", target, f"must be one of {', '.join(RECIPES)}; others take a recipe")
    if not 0 < budget < 1:
        raise invalid("--budget", budget, "must be above 0 and below 1")
    model = on_meta(teacher_config(teacher), torch.float32)
    limit = model.config.max_position_embeddings
    context = kv_context(model) if context is None else context
    if not 1 <= context <= limit:
        raise invalid("--context", context, f"must be from 1 to {limit}, the teacher's limit")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    small = sum(p.numel() for p in model.parameters()) < SMALL
    file = RECIPES[target][0 if accelerator is None else 1 if small else 2]
    editable = editable_layers(model.config)
    recipe = read_yaml(CONFIGS / f"{file}.yaml", "recipe", "recipe")
    letter: dict[str, Any] = recipe["targets"]["S"]
    if target == "gate_swa":
        cached = cached_by_letter(model, {"S": target_from_dict(letter)}, context)
        plan = Sensitivity({"S": [1.0] * len(cached["S"])}).plan(cached, budget)
        recipe["pattern"] = spread_evenly(plan, "S", editable)
        kept = sum(plan[index] == FULL for index in editable)
        what = f"window {letter['window']}, {letter['sinks']} first tokens, {kept} of {len(editable)} layers full"
        share = kv_share(cached, recipe["pattern"])
    else:
        spec, held = attention_spec(model.config), held_bytes(model, context)
        whole, edited = sum(held), sum(held[index] for index in editable)  # the rest stays as it is
        rope = min(spec.head_dim // 2, 2 * spec.rope_pairs)

        def share_of(rank: int) -> float:
            return (whole - edited + edited * (rank + rope) / spec.cached_values_per_token) / whole

        for_latents = 1 - (1 - budget) * whole / edited
        rank = int(round(for_latents * spec.cached_values_per_token, 6) - rope) // RANKS * RANKS
        if rank < RANKS:
            least = share_of(RANKS)
            raise invalid("--budget", budget, f"must be at least {least:.3f} with a rotated width of {rope}")
        letter |= {"kv_lora_rank": rank, "qk_rope_head_dim": rope}
        target_from_dict(letter).check(spec)
        where = "every layer" if len(editable) == len(held) else f"{len(editable)} of {len(held)} layers"
        what, share = f"latent {rank} + {rope} rotated values in {where}", share_of(rank)
    recipe |= {"teacher": teacher, "name": f"{_short(teacher)}_{target}_{budget:g}"}
    recipe["data"] = {name: value for name, value in recipe["data"].items() if not name.endswith("source")}
    for lengths in (recipe["data"], *recipe["stage2"].get("phases", [])):
        given, lengths["seq_len"] = lengths["seq_len"], min(lengths["seq_len"], limit)
        lengths["batch_size"] = lengths["batch_size"] * given // lengths["seq_len"]  # as many tokens in a step
    _fit_devices(recipe, accelerator)
    said = f"{target}, {what}: KV budget {share:.1%} at {context:,} tokens; trained as in configs/{file}.yaml"
    return recipe, f"{said} on {accelerator or 'the CPU'}"


def _fit_devices(recipe: dict[str, Any], accelerator: torch.device | None) -> None:
    """As many devices as are here, with as many sequences in a step as on the recipe's."""
    if accelerator is None:
        return
    trainer: dict[str, Any] = recipe["trainer"]
    before, here = trainer["devices"], torch.accelerator.device_count() if trainer["devices"] > 1 else 1
    trainer |= {"devices": here, "accelerator": "gpu" if accelerator.type == "cuda" else accelerator.type}
    if here == 1:
        trainer.pop("strategy", None)
    for stage in (recipe["stage1"], recipe["stage2"]):
        stage["accumulate"] = max(1, stage.get("accumulate", 1) * before // here)
        if accelerator.type != "cuda":
            stage.get("options", {}).pop("cuda_graph", None)


def _short(teacher: str) -> str:
    """The name of a run folder."""
    return re.sub(r"[^\w-]+", "_", Path(teacher.removeprefix("package:")).name.removesuffix(".gguf")).strip("_").lower()
