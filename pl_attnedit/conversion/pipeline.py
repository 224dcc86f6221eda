"""A whole conversion: init, stage 1, stage 2, saved student, evaluation, report.

Every phase leaves its result in the run folder before the next begins, so a conversion that was stopped goes on with the
phase it was in; within a stage, with the last checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from pl_attnedit.callbacks import (
    Throughput,
    check_checkpoint,
    latest_checkpoint,
)
from pl_attnedit.conversion.checks import check_recipe, check_teacher_runs, stage_module
from pl_attnedit.conversion.evaluation import build_tasks, check_tasks, evaluate_student, measure_cache
from pl_attnedit.conversion.recipe import Recipe, StageRecipe
from pl_attnedit.conversion.run_folder import RunFolder, read_summary
from pl_attnedit.conversion.summary import log_student, log_summary, summarise
from pl_attnedit.conversion.trainers import check_machine, save_student, stage_trainer
from pl_attnedit.data import TextDataModule
from pl_attnedit.distillation import STAGES, DistillationModule
from pl_attnedit.distillation.validation import TeacherHidden
from pl_attnedit.errors import UserError
from pl_attnedit.eval.evaluation_log import log_evaluation
from pl_attnedit.eval.report.card import write_card
from pl_attnedit.eval.report.page import write_report
from pl_attnedit.files import json_text, write_atomically
from pl_attnedit.memory import release_memory
from pl_attnedit.teachers.sources.resolve import resolve_teacher, teacher_fingerprint
from pl_attnedit.tracking import (
    ConversionRuns,
    TrackedRun,
    TrackingLogger,
    connect,
    evaluation_text,
    log_environment,
    open_conversion,
    resolve_tracking_uri,
    training_text,
)
from pl_attnedit.tracking.conversion import RUNS_FILE

RESULTS = {"stage1": "stage1/student", "stage2": "student"}  # folders of what the stages make


def convert(recipe: Recipe, data_options: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any] | None:
    """Runs what is left of a conversion and returns its summary; None in the further processes of a distributed one.

    Args:
        recipe: the recipe.
        data_options: arguments of `TextDataModule` other than the tokenizer.
        plain: the resolved recipe as plain data, for the run folder and MLflow.
    """
    # mistakes are errors before a run folder exists
    data = TextDataModule(tokenizer=recipe.teacher, **data_options)
    _, plan = check_recipe(recipe)
    resolve_tracking_uri(recipe.tracking_uri)
    resolve_teacher(recipe.teacher)
    path = Path(recipe.runs) / recipe.name
    data.setup()
    trainer = check_machine(recipe)
    for stage in (recipe.stage1, recipe.stage2):
        data.phases = stage.phases
        if stage.total_steps:
            data.check_batches(trainer.world_size)
    if trainer.is_global_zero and not (path / RUNS_FILE).exists():
        check_tasks(recipe, data)
        check_teacher_runs(recipe, trainer.strategy.root_device)
        release_memory()
        connect(recipe.tracking_uri)
    folder = RunFolder(path, plain, follows=not trainer.is_global_zero)
    if not trainer.is_global_zero:
        Conversion(recipe, data, folder, None, plain).follow()
        return None
    teacher = teacher_fingerprint(recipe.teacher)
    folder.keep_to({"teacher": teacher, "text": data.fingerprint})
    if folder.done("report") and not (path / RESULTS["stage2"]).is_dir():
        raise UserError(f"{path / RESULTS['stage2']}: is gone; remove {path} to begin anew, or give another --name")
    if folder.done("report") and recipe.register is None:
        Conversion.say(f"{recipe.name}: done before")
        return read_summary(folder.path)
    kinds = {target.type for target in plan.targets.values()}
    tags = {
        "teacher": recipe.teacher,
        "target": "+".join(sorted(kinds)),
        "recipe": recipe.name,
        "pattern": recipe.pattern or "",
    }
    runs = open_conversion(
        folder.path, recipe.name, tags, tracking_uri=recipe.tracking_uri, experiment=recipe.experiment
    )
    if folder.done("report"):
        Conversion.say(f"{recipe.name}: done before, registered as {recipe.register}")
        summary = read_summary(folder.path)
        log_student(parent := runs.run(), path / "student", recipe, summary["pattern"])
        parent.flush()
        return summary
    return Conversion(recipe, data, folder, runs, plain).run()


class Conversion:
    """The phases of one conversion over its run folder and its MLflow runs.

    With several processes that of rank 0 does all of it, and has the run folder and the MLflow runs to itself; the others
    `follow`: they take part where a model is trained or measured by all.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TextDataModule,
        folder: RunFolder,
        runs: ConversionRuns | None,
        plain: dict[str, Any],
    ) -> None:
        self.recipe, self.data, self.folder, self.plain = recipe, data, folder, plain
        self._runs = runs
        self._teacher_hidden: TeacherHidden = {}

    def run(self) -> dict[str, Any]:
        self.folder.start()
        with self.runs.run() as parent:
            log_environment(
                parent,
                config=self.plain,
                data_fingerprint=self.data.fingerprint,
                teacher_fingerprint=teacher_fingerprint(self.recipe.teacher),
            )
            used = training_text(self.data)
            for run in (parent, self.runs.run("stage1"), self.runs.run("stage2")):
                run.log_datasets(used)
            self.runs.run("evaluation").log_datasets(evaluation_text(self.data))
            self.phase("init", self.initialise)
            self.phase("stage1", lambda: self.stage("stage1", self.recipe.stage1, "init"))
            self.phase("stage2", lambda: self.stage("stage2", self.recipe.stage2, "stage1/student"))
            self.phase("kv", lambda: measure_cache(self.recipe, self.folder.path))
            self.phase("evaluation", self.evaluate)
            self.summarise(parent)
        self.phase("report", self.report)
        return read_summary(self.folder.path)

    def follow(self) -> None:
        """The part of `run` for processes other than rank 0. Which phases are done cannot change without them."""
        if not self.folder.done("init"):
            self.initialise()
            self.let_go()
        if not self.folder.done("stage1"):
            self.stage("stage1", self.recipe.stage1, "init")
            self.let_go()
        if not self.folder.done("stage2"):
            self.stage("stage2", self.recipe.stage2, "stage1/student")

    @property
    def runs(self) -> ConversionRuns:
        assert self._runs is not None, "of rank 0 only"
        return self._runs

    @property
    def follows(self) -> bool:
        return self._runs is None

    def phase(self, name: str, work: Any) -> None:
        if self.folder.done(name):
            self.say(f"{name}: done before")
            return
        self.say(name)
        self.folder.finish(name, work())
        self.let_go()

    def let_go(self) -> None:
        """Frees the models of a phase before the next makes its own."""
        self.data.trainer = None  # Lightning has put the Trainer there, which holds them
        release_memory()

    @staticmethod
    def say(text: str) -> None:
        print(f"== {text}", file=sys.stderr, flush=True)

    # phases

    def initialise(self) -> dict[str, float]:
        """Builds the student and measures it untrained."""
        seed_everything(self.recipe.seed, verbose=False)
        module = self.module("stage1", self.recipe.stage1, None)
        trainer = self.trainer("init", None)
        found = self.validate(trainer, module)
        if not self.follows:
            self.runs.run("stage1").log_metrics(found, step=0)  # where the curves of stage 1 begin
        self.folder.save_folder("init", lambda path: save_student(module, path, trunk=self.is_last("init")))
        return found

    def stage(self, name: str, stage: StageRecipe, start: str) -> dict[str, Any]:
        """Trains one stage from its last checkpoint, or from the student in the folder `start`; saves and measures it."""
        if not stage.total_steps:
            return self.leave_out(name, start)
        seed_everything(self.recipe.seed, verbose=False)
        checkpoint = latest_checkpoint(self.folder.path / name)
        module = self.module(name, stage, start)
        if checkpoint is not None:
            fingerprint = teacher_fingerprint(self.recipe.teacher)
            check_checkpoint(checkpoint, stage=name, teacher=fingerprint)
            self.say(f"{name}: goes on from {checkpoint.name}")
        trainer = self.trainer(name, stage)
        self.data.phases = stage.phases
        self.data.seed = self.recipe.seed + list(STAGES).index(name)  # stage 2 sees new text
        trainer.fit(module, self.data, ckpt_path=str(checkpoint) if checkpoint else None)
        speed = next(each for each in trainer.callbacks if isinstance(each, Throughput)).tokens_per_second  # type: ignore[attr-defined]
        dtype = module.frozen_dtype if name == "stage2" else None
        whole = self.is_last(name)
        self.folder.save_folder(RESULTS[name], lambda path: save_student(module, path, dtype, trunk=whole))
        found = self.validate(trainer, module)
        if not self.follows:
            self.runs.run(name).finish()
        batch = trainer.num_devices * trainer.num_nodes * stage.accumulate
        phases = stage.all_phases(self.data.seq_len, self.data.batch_size)
        tokens = batch * sum(phase.steps * phase.batch_size * phase.seq_len for phase in phases)
        return found | {"tokens": tokens, "tokens_per_s": speed}

    def is_last(self, name: str) -> bool:
        """Whether no stage trains after this phase, so that what it saves is the student."""
        later = {"init": (self.recipe.stage1, self.recipe.stage2), "stage1": (self.recipe.stage2,), "stage2": ()}
        return not any(stage.total_steps for stage in later[name])

    def leave_out(self, name: str, start: str) -> dict[str, Any]:
        """What a stage of no steps hands on: the student it got, and that one's figures."""
        if self.follows:  # they know no figures
            return {}
        copy = partial(shutil.copytree, self.folder.path / start, dirs_exist_ok=True)
        self.folder.save_folder(RESULTS[name], copy)
        self.runs.run(name).finish()
        before = self.folder.progress["init" if name == "stage1" else "stage1"]
        return {**before, "tokens": 0, "tokens_per_s": None}

    def evaluate(self) -> list[dict[str, Any]]:
        """Teacher and student answer the same tasks; the result goes to MLflow and into the run folder."""
        build_tasks(self.recipe, self.data, self.folder.path)
        device = self.trainer("evaluation", None).strategy.root_device
        result, texts = evaluate_student(self.recipe, self.folder.path, self.data.seq_len, device)
        with self.runs.run("evaluation") as run:
            log_evaluation(result, run, texts)
        return result.content()["tasks"]

    def report(self) -> str:
        """report.html and the student's model card; what only a resumed conversion needs goes."""
        summary = read_summary(self.folder.path)
        write_card(self.folder.path / "student", summary, self.plain, self.folder.progress["evaluation"])
        path = write_report([self.runs.run_id], self.folder.path / "report.html", self.runs.tracking_uri)
        for leftover in ("init", "stage1/student"):
            self.folder.remove(leftover)
        return path.name

    def summarise(self, parent: TrackedRun) -> None:
        """summary.json and what the parent run shows of it."""
        progress = self.folder.progress
        summary = summarise(self.recipe, self.plain["targets"], progress, self.runs.run_id)
        path = write_atomically(self.folder.path / "summary.json", json_text(summary))
        log_student(parent, self.folder.path / "student", self.recipe, summary["pattern"])
        log_summary(parent, summary, progress["evaluation"], path)

    # parts of the phases

    def module(self, name: str, stage: StageRecipe, start: str | None) -> DistillationModule:
        init_from = None if start is None else str(self.folder.path / start)
        return stage_module(self.recipe, name, stage, init_from)

    def trainer(self, name: str, stage: StageRecipe | None) -> Trainer:
        logger = None
        if stage is not None and not self.follows:
            runs = self.runs
            logger = TrackingLogger(runs.tracking_uri, run_id=runs.children[name], spool_dir=runs.spool_dir)
        return stage_trainer(self.recipe, name, stage, self.folder.path / name, logger)

    def validate(self, trainer: Trainer, module: DistillationModule) -> dict[str, float]:
        """Held-out figures; the teacher's part is computed once per process."""
        trainer.limit_val_batches = 1.0
        module.teacher_hidden = self._teacher_hidden
        [found] = trainer.validate(module, self.data, verbose=False)
        return dict(found)
