"""A study: one recipe, varied. What does a choice do to the result, and is the difference more than chance?

Every variant runs with every seed, each as a conversion of its own (a process, a run folder, MLflow runs in the study's
experiment). Variants with several seeds tell how far results of one and the same recipe lie apart; that spread, pooled,
gives the interval of every ratio to the first variant. What is compared is what the run folders hold of these very recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pl_attnedit.config_files import merged, read_yaml
from pl_attnedit.errors import invalid

SET_BY_STUDY = ("name", "seed", "experiment")  # fields of a recipe that neither variants nor options may set


@dataclass(frozen=True)
class Study:
    """A study as its YAML has it.

    Args:
        name: of its folder under `runs` and of its MLflow experiment.
        base: recipe that all variants start from; a relative path begins beside the study's file.
        variants: by name, the fields of the recipe that differ, nested as in the recipe; the first is what the others are
            compared with.
        change: fields that differ from the base in all variants, e.g. a smaller budget.
        seeds: of all variants; a variant's own field `seeds` replaces them.
    """

    name: str
    base: str
    variants: dict[str, dict[str, Any]]
    change: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])

    def recipes(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Variant, seed and recipe of each conversion; first all variants with their first seed, then with their second."""
        base = read_yaml(self.base, "base", "recipe")
        seeds = {name: fields.get("seeds", self.seeds) for name, fields in self.variants.items()}
        for turn in range(max(map(len, seeds.values()))):
            for name, fields_of_it in self.variants.items():
                if turn >= len(seeds[name]):
                    continue
                seed = seeds[name][turn]
                own = {key: value for key, value in fields_of_it.items() if key != "seeds"}
                recipe = merged(merged(base, self.change), own)
                yield name, seed, {**recipe, "name": f"{_label(name)}-{seed}", "seed": seed, "experiment": self.name}


def _label(variant: str) -> str:
    """What its runs and folders are called."""
    return re.sub(r"[^\w.-]+", "_", variant)


def read_study(path: str | Path) -> Study:
    """A study from its YAML file.

    Raises:
        UserError: no such file, not YAML, or a field that is unknown, missing or of the wrong kind.
    """
    path = Path(path).expanduser()
    content = read_yaml(path, "study", "study")
    known = {each.name: each for each in fields(Study)}
    if not {"name", "base", "variants"} <= content.keys():
        raise invalid("study", str(path), "must have name, base and variants")
    for name in content.keys() - known.keys():
        raise invalid("study", name, f"is no field; known are {', '.join(known)}")
    name = content["name"]
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise invalid("name", name, "must be a name that a folder can have")
    given = content["variants"]
    variants = given if isinstance(given, dict) else {}
    content["variants"] = {str(name): own or {} for name, own in variants.items()}
    if not content["variants"] or not all(isinstance(own, dict) for own in content["variants"].values()):
        raise invalid("variants", given, "must map names to fields of the recipe")
    labels = {_label(name): name for name in content["variants"]}
    if alike := [name for name in content["variants"] if labels[_label(name)] != name]:
        raise invalid("variants", alike[0], f"would be the same run as {labels[_label(alike[0])]!r}")
    change = content.get("change", {})
    if not isinstance(change, dict):
        raise invalid("change", change, "must be fields of the recipe")
    for place, own in {"change": change, **content["variants"]}.items():
        if ours := [key for key in SET_BY_STUDY if key in own]:
            raise invalid(place, ours[0], "is the study's to set: it has a name, and a list of seeds")
    content["base"] = str(path.parent / Path(str(content["base"])).expanduser())
    read_yaml(content["base"], "base", "recipe")
    study = Study(**content)
    for seeds in [study.seeds, *(own["seeds"] for own in study.variants.values() if "seeds" in own)]:
        numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not numbers or not seeds or len(set(seeds)) < len(seeds):
            raise invalid("seeds", seeds, "must be a list of different numbers")
    return study
