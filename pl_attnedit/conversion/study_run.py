"""The conversions of a study, several at a time, and what they have found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from pl_attnedit.conversion.checks import check_recipe
from pl_attnedit.conversion.recipe import Recipe, as_plain, read_recipe, recipe_parser
from pl_attnedit.conversion.run_folder import changed_fields, is_finished, is_running, read_summary
from pl_attnedit.conversion.study import SET_BY_STUDY, Study
from pl_attnedit.conversion.study_results import rows
from pl_attnedit.conversion.trainers import check_machine
from pl_attnedit.errors import UserError, in_one_line, invalid
from pl_attnedit.files import write_atomically
from pl_attnedit.teachers.sources.resolve import resolve_teacher
from pl_attnedit.tracking import connect
from pl_attnedit.tracking.conversion import experiment_id


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
            raise UserError(f"variant {variant!r}: {in_one_line(str(error))}") from error
        ours = {
            "dry_run": False,
            "target": None,
            "runs": fields.get("runs", "runs"),
            **{key: fields[key] for key in SET_BY_STUDY},
        }
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
            with self._lock:
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
