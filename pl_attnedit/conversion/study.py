"""A study: one recipe, varied. What does a choice do to the result, and is the difference more than chance?

Every variant runs with every seed, each as a conversion of its own (a process, a run folder, MLflow runs in the study's
experiment). Variants with several seeds tell how far results of one and the same recipe lie apart; that spread, pooled,
gives the interval of every ratio to the first variant. What is compared is what the run folders hold of these very recipes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentParser
from scipy import stats

from pl_attnedit.config_files import merged, read_yaml
from pl_attnedit.conversion.checks import check_recipe
from pl_attnedit.conversion.recipe import Recipe, as_plain, read_recipe, recipe_parser
from pl_attnedit.conversion.run_folder import changed_fields, is_finished, is_running, read_summary
from pl_attnedit.conversion.trainers import check_machine
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.report.formatting import aligned
from pl_attnedit.files import write_atomically
from pl_attnedit.teachers.sources.resolve import resolve_teacher
from pl_attnedit.tracking import connect
from pl_attnedit.tracking.conversion import experiment_id

_OF_THE_STUDY = ("name", "seed", "experiment")  # fields of a recipe that are not the options' to set
FIGURES = ("kl_before", "kl_after_stage1", "kl_after_stage2", "top1_after", "wall_seconds")


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
        if ours := [key for key in _OF_THE_STUDY if key in own]:
            raise invalid(place, ours[0], "is the study's to set: it has a name, and a list of seeds")
    content["base"] = str(path.parent / Path(str(content["base"])).expanduser())
    read_yaml(content["base"], "base", "recipe")
    study = Study(**content)
    for seeds in [study.seeds, *(own["seeds"] for own in study.variants.values() if "seeds" in own)]:
        numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not numbers or not seeds or len(set(seeds)) < len(seeds):
            raise invalid("seeds", seeds, "must be a list of different numbers")
    return study


@dataclass(frozen=True)
class StudyConversion:
    """One conversion of a study.

    Args:
        variant: its variant.
        seed: its seed.
        fields: of its recipe, as YAML has them.
        recipe: the recipe with the further options.
        plain: the resolved recipe as plain data, as its run folder keeps it.
    """

    variant: str
    seed: int
    fields: dict[str, Any]
    recipe: Recipe
    plain: dict[str, Any]


class StudyRun:
    """Runs the conversions of a study that are not done yet, several at a time.

    Args:
        study: what to run.
        runs: folder of the run folders; the study's is in there.
        options: further options of every `pl-attnedit convert`.
        workers: conversions at a time; with several GPUs they take turns on them.
        only: run the variants whose name contains one of these.

    Raises:
        UserError: a variant that is no recipe, or options that would change which conversions the study consists of.
    """

    def __init__(
        self, study: Study, runs: Path, options: Sequence[str] = (), workers: int = 1, only: Sequence[str] | None = None
    ) -> None:
        self.folder, self.options, self.workers = runs / study.name, list(options), workers
        self.study = study
        parser = recipe_parser()
        self.conversions = [self._conversion(parser, *each) for each in study.recipes()]
        self.chosen = [each for each in self.conversions if only is None or any(part in each.variant for part in only)]
        if not self.chosen:
            raise invalid("only", only, f"must be part of one of: {'; '.join(study.variants)}")
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def _conversion(self, parser: ArgumentParser, variant: str, seed: int, fields: dict[str, Any]) -> StudyConversion:
        try:
            config = parser.parse_args(["-c", json.dumps(fields), *self.options])
            recipe, _ = read_recipe(parser, config)
        except (ArgumentError, UserError) as error:
            raise UserError(f"variant {variant!r}: {error}") from error
        ours = {"dry_run": False, "runs": fields.get("runs", "runs"), **{key: fields[key] for key in _OF_THE_STUDY}}
        if changed := [key for key, value in ours.items() if getattr(config, key) != value]:
            raise UserError(f"options after --: {', '.join(changed)} cannot be given, the study sets what it needs")
        return StudyConversion(variant, seed, fields, recipe, as_plain(parser, config))

    def run(self) -> list[str]:
        """Returns what failed, as variant and seed. A signal ends the conversions that run; the same call goes on.

        Raises:
            UserError: a variant that no stage or teacher fits, before the first conversion.
        """
        for each in self.chosen:
            try:
                check_recipe(each.recipe)
                check_machine(each.recipe)
                resolve_teacher(each.recipe.teacher)
            except UserError as error:
                raise UserError(f"variant {each.variant!r}: {error}") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        experiment_id(connect(self.chosen[0].recipe.tracking_uri), self.study.name)
        devices: SimpleQueue[str | None] = SimpleQueue()
        for worker in range(self.workers):
            devices.put(_device(worker))
        failed: list[str] = []

        def convert(each: StudyConversion) -> None:
            device = devices.get()
            try:
                if not self._stopped and not self._convert(each, device):
                    failed.append(f"{each.variant}, seed {each.seed}")
            finally:
                devices.put(device)

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in [pool.submit(convert, each) for each in self.chosen]:
                    future.result()
            except BaseException:
                self._stop()
                raise
        return failed

    def _convert(self, each: StudyConversion, device: str | None) -> bool:
        name = each.recipe.name
        folder, file, log = (self.folder / f"{name}{ending}" for ending in ("", ".yaml", ".log"))
        self._await_others(name, folder)
        if is_finished(folder) and not changed_fields(folder, each.plain):
            return self._say(f"{name}: done before")
        write_atomically(file, yaml.safe_dump(each.fields, sort_keys=False))
        command = [sys.executable, "-m", "pl_attnedit.cli", "convert", "-c", str(file), "--runs", str(self.folder)]
        environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        with log.open("ab") as out:
            begin = out.tell()
            with self._lock:
                if self._stopped:
                    return True
                # of a session of its own: Ctrl-C reaches it through `_stop` alone
                process = subprocess.Popen(
                    [*command, *self.options], env=environment, stdout=out, stderr=out, start_new_session=True
                )
                self._processes.add(process)
            self._say(f"{name}: runs" + ("" if device is None else f" on GPU {device}"))
            status = process.wait()
            self._processes.discard(process)
        if status == 0 or self._stopped:
            return self._say(f"{name}: {'done' if status == 0 else 'stopped'}")
        if is_running(folder):  # by a process that began meanwhile and was quicker
            return self._convert(each, device)
        lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
        self._say(f"{name}: failed, {lines[-1] if lines else f'status {status}'} ({log})")
        return False

    def _await_others(self, name: str, folder: Path) -> None:
        if is_running(folder):
            self._say(f"{name}: another process runs it, waits for that")
            while is_running(folder) and not self._stopped:
                time.sleep(1)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)

    @staticmethod
    def _say(text: str) -> bool:
        print(f"== {text}", file=sys.stderr, flush=True)
        return True

    def results(self) -> dict[str, Any]:
        """What all finished conversions found: the study, and one row for each variant; see `rows`.

        Raises:
            UserError: a summary that cannot be read.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for each in self.conversions:
            folder = self.folder / each.recipe.name
            if not (folder / "summary.json").exists():
                continue
            if changed := changed_fields(folder, each.plain):
                self._say(f"{each.recipe.name}: left out, holds another recipe ({', '.join(changed)} differ)")
                continue
            found.setdefault(each.variant, []).append({"seed": each.seed, **read_summary(folder)})
        first = next(iter(self.study.variants))
        if found and first not in found:
            self._say(f"{first}: has no result yet, so there are no ratios to it")
        return {"study": asdict(self.study) | {"base": Path(self.study.base).name}, "rows": rows(found, first)}


def _device(worker: int) -> str | None:
    """The GPU of a worker, None where there is at most one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        visible = [each for each in given.split(",") if each]
    else:
        import torch

        visible = [str(index) for index in range(torch.cuda.device_count())]
    return visible[worker % len(visible)] if len(visible) > 1 else None


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]], first: str) -> list[dict[str, Any]]:
    """One row for each variant, from the summaries of its conversions.

    Keys: variant, seeds, tokens of each stage, KV budget, the mean of `FIGURES`, `kl` of each seed, and `ratio`: the KL over
    that of the variant `first`, geometric means over seeds, with its 95% interval `ratio_low` to `ratio_high`. The interval
    is Student's on the logarithm, its deviation pooled over the variants that have several seeds. None where there is none:
    `first` not among them, a KL that is 0 or no number, no variant with several seeds.
    """
    kls = {name: [each["kl_after_stage2"] for each in of_it] for name, of_it in found.items()}
    logs = {name: np.log(values) for name, values in kls.items() if all(0 < each < np.inf for each in values)}
    freedom = sum(len(values) - 1 for values in logs.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in logs.values())
    table = []
    for name, of_it in found.items():
        row: dict[str, Any] = {"variant": name, "seeds": [each["seed"] for each in of_it]}
        row |= {stage: of_it[0][stage] for stage in ("tokens_stage1", "tokens_stage2")}
        row["kv_budget"] = of_it[0]["kv_budget"]
        row |= {key: float(np.mean([each[key] for each in of_it])) for key in FIGURES}
        row |= {"kl": kls[name], "ratio": None, "ratio_low": None, "ratio_high": None}
        if name in logs and first in logs:
            distance = float(logs[name].mean() - logs[first].mean())
            row["ratio"] = float(np.exp(distance))
            if freedom and name != first:
                error = (squares / freedom * (1 / len(of_it) + 1 / len(logs[first]))) ** 0.5
                reach = float(stats.t.ppf(0.975, freedom)) * error
                row |= {"ratio_low": float(np.exp(distance - reach)), "ratio_high": float(np.exp(distance + reach))}
        table.append(row)
    return table


def study_table(results: Mapping[str, Any]) -> str:
    """The rows as aligned text."""
    head = ("variant", "seeds", "tokens", "KL before", "stage 1", "stage 2", "top-1", "KL / first [95%]")
    table: list[tuple[str, ...]] = [head]
    for row in results["rows"]:
        tokens = f"{row['tokens_stage1'] / 1e6:.1f}M+{row['tokens_stage2'] / 1e6:.1f}M"
        figures = tuple(f"{row[key]:.4f}" for key in FIGURES[:3])
        table.append(
            (row["variant"], str(len(row["seeds"])), tokens, *figures, f"{row['top1_after']:.1%}", ratio_text(row))
        )
    return "\n".join(aligned(table))


def ratio_text(row: Mapping[str, Any]) -> str:
    """The ratio to the first variant with its interval, where there are such."""
    if row["ratio"] is None:
        return "-"
    interval = "" if row["ratio_low"] is None else f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return f"{row['ratio']:.2f}{interval}"
