"""The recipe: everything a whole conversion needs to know, as one YAML."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, Trainer

from pl_attnedit.attention import TARGETS
from pl_attnedit.checkpoints.disk import refuse_url
from pl_attnedit.config_files import RULE, LayeredParser, RecipeFile, options_of
from pl_attnedit.data import Phase, TextDataModule
from pl_attnedit.distillation import LayerwiseDistillation, ModelDistillation
from pl_attnedit.errors import invalid

# what a conversion sets itself
SET_BY_CONVERSION = {
    *("max_steps", "max_epochs", "max_time", "accumulate_grad_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "callbacks", "logger", "limit_val_batches", "fast_dev_run", "overfit_batches"),
    *("enable_checkpointing", "limit_train_batches", "barebones"),
}
# fields of the recipe or of a stage, or the conversion's to set
SET_BY_RECIPE = {
    *("teacher", "targets", "pattern", "layers", "init", "calibration_tokens", "init_from", "dtype"),
    *("learning_rate", "warmup_steps"),
}

# What a parser lists and checks. A recipe itself holds those that were given, as a mapping.
# `check_recipe` says which precisions there are; of a union jsonargparse takes the first type that fits.
_TYPES = {"precision": Any, "devices": list[int] | int | str}
TrainerOptions: Any = options_of("TrainerOptions", Trainer, SET_BY_CONVERSION, **_TYPES)
Stage1Options: Any = options_of("Stage1Options", LayerwiseDistillation, SET_BY_RECIPE)
Stage2Options: Any = options_of("Stage2Options", ModelDistillation, SET_BY_RECIPE)


@dataclass
class StageRecipe:
    """One stage.

    Args:
        steps: optimiser steps; 0 leaves the stage out.
        learning_rate: peak learning rate; linear warm-up, then a cosine.
        phases: instead of steps and learning_rate, e.g. through sequence lengths: one training in which each phase has
            its own and its batches; by default it is one phase, of the data's seq_len and batch_size.
        warmup_steps: optimiser steps of warm-up.
        accumulate: batches per optimiser step.
        validate_every: optimiser steps between validations on the way; None = only before and after the stage.
        callbacks: further callbacks by class path, e.g. pl_attnedit.callbacks.ProgressiveUnfreezing; a
            ResumableCheckpoint replaces the one with the default interval (its folder is the run folder's).
        options: further arguments of the stage's module.
    """

    steps: int | None = None
    learning_rate: float | None = None
    phases: list[Phase] = field(default_factory=list)
    warmup_steps: int = 10
    accumulate: int = 1
    validate_every: int | None = None
    callbacks: list[Callback] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate"):
            value = getattr(self, name)
            if (value is None) != bool(self.phases):
                allowed = "has each phase its own: leave it out" if self.phases else "must be given, or phases"
                raise invalid(name, value, allowed)
        for name, least in (("steps", 0), ("accumulate", 1), ("validate_every", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise invalid(name, getattr(self, name), f"must be at least {least}")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise invalid("learning_rate", self.learning_rate, "must be positive")

    def all_phases(self, seq_len: int, batch_size: int) -> list[Phase]:
        """What the stage goes through; seq_len and batch_size are the data's."""
        if self.phases:
            return self.phases
        assert self.steps is not None
        assert self.learning_rate is not None
        return [Phase(seq_len, batch_size, self.steps, self.learning_rate)]

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.all_phases(1, 1))

    @property
    def first_rate(self) -> float:
        """The peak learning rate, of the first phase that has steps."""
        phases = self.all_phases(1, 1)
        return next((phase.learning_rate for phase in phases if phase.steps), phases[0].learning_rate)


@dataclass
class Stage1Recipe(StageRecipe):
    __doc__ = StageRecipe.__doc__
    options: Stage1Options = field(default_factory=Stage1Options)


@dataclass
class Stage2Recipe(StageRecipe):
    __doc__ = StageRecipe.__doc__
    options: Stage2Options = field(default_factory=Stage2Options)


@dataclass
class EvaluationRecipe:
    """What the finished student is asked beside its teacher.

    Args:
        documents: held-out documents whose rolling perplexity is measured.
        cloze: questions that ask for the true continuation of a held-out text among four.
        continuation_tokens: tokens of the greedy continuations that the report shows side by side; 0 = none.
    """

    documents: int = 8
    cloze: int = 48
    continuation_tokens: int = 32

    def __post_init__(self) -> None:
        for name, least in (("documents", 2), ("cloze", 2), ("continuation_tokens", 0)):
            if getattr(self, name) < least:
                raise invalid(name, getattr(self, name), f"must be at least {least}")


@dataclass
class Recipe:
    """A whole conversion.

    Args:
        name: of the run folder `runs/NAME` and of the MLflow run.
        teacher: hub name, folder, GGUF file, package:NAME, or shape:NAME for random weights.
        targets: the target for each pattern letter, e.g. {S: {type: gate_swa, window: 512}}.
        stage1: layer-wise distillation with teacher forcing.
        stage2: distillation of next-token distributions.
        pattern: letters repeated over the layers, F = full layer. Default: the target's own.
        layers: explicit indices of the layers to edit, instead of a pattern.
        init: random | copy | calibrated | plain_svd (a baseline, for MLA alone).
        calibration_tokens: tokens of training text that a calibrated (or plain_svd) init looks at.
        dtype: dtype of the teacher, of what is frozen and of the saved student; what trains is in float32 at least.
        seed: of everything random.
        evaluation: what teacher and student are asked at the end.
        trainer: further arguments of Lightning's Trainer.
        runs: folder of the run folders.
        experiment: of MLflow, that the runs are kept in.
        tracking_uri: of MLflow; default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder.
        register: name in MLflow's model registry of which the student becomes a version; no weights are uploaded.
    """

    name: str
    teacher: str
    targets: dict[str, Any]
    stage1: Stage1Recipe
    stage2: Stage2Recipe
    pattern: str | None = None
    layers: list[int] | None = None
    init: str = "calibrated"
    calibration_tokens: int = 16384
    dtype: str = "float32"
    seed: int = 0
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    runs: str = "runs"
    experiment: str = "pl_attnedit"
    tracking_uri: str | None = None
    register: str | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or Path(self.name).name != self.name:
            raise invalid("name", self.name, "must be the name of one folder")
        self.trainer = _given("trainer", self.trainer, TrainerOptions)
        self.stage1.options = _given("stage1.options", self.stage1.options, Stage1Options)
        self.stage2.options = _given("stage2.options", self.stage2.options, Stage2Options)
        self.runs = os.path.expanduser(self.runs)
        if not 0 <= self.seed < 2**32 - 1:  # stage 2 draws its text with the next one
            raise invalid("seed", self.seed, "must be from 0 to 2**32 - 2")
        refuse_url("runs", self.runs)
        if self.register is not None:
            from pl_attnedit.tracking import check_registered_name  # MLflow takes seconds, and `--help` needs none

            check_registered_name(self.register)
        for name, kind in (("experiment", "a name"), ("runs", "a folder")):
            if not getattr(self, name):
                raise invalid(name, getattr(self, name), f"must be {kind}")


def _given(field: str, options: Any, kind: Any) -> dict[str, Any]:
    """Those that are not null, of what was parsed or of a mapping."""
    found = options if isinstance(options, dict) else vars(options)
    known = [field.name for field in fields(kind)]
    for name in found:
        if name not in known:
            raise invalid(field, name, f"known are {', '.join(sorted(known))}")
    return {name: value for name, value in found.items() if value is not None}


def phases_text(recipe: Recipe) -> str:
    """What stages that have phases go through; "" where none has."""
    stages = {"stage 1": recipe.stage1.phases, "stage 2": recipe.stage2.phases}
    return "; ".join(f"{name}: {', '.join(map(str, phases))}" for name, phases in stages.items() if phases)


# where a recipe runs and is kept does not change what it computes
PLACE_FIELDS = (
    "config",
    "dry_run",
    "json",
    "target",
    "budget",
    "context",
    "runs",
    "experiment",
    "tracking_uri",
    "register",
)


def recipe_parser() -> ArgumentParser:
    """The parser behind `pl-attnedit convert`: every field of the recipe is an option, and a YAML may give them all."""
    parser = LayeredParser(
        prog="pl-attnedit convert",
        exit_on_error=False,
        description=f"Run a whole conversion: init, stage 1, stage 2, saved student, evaluation, report. {RULE}",
    )
    help_ = "recipe YAML; further ones, e.g. of configs/trainer, lie over it"
    parser.add_argument("-c", "--config", action=RecipeFile, help=help_)
    parser.add_class_arguments(Recipe)
    [targets] = (action for action in parser._actions if action.dest == "targets")
    targets.help = f"{targets.help} Fields: {_fields_of_targets()}."
    parser.add_class_arguments(TextDataModule, "data", skip={"tokenizer", "phases"}, instantiate=False)
    dry_run = "only print what would be trained, cached and held in memory, and for how long: needs no weights, no text"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    target = (
        "instead of a recipe: gate_swa or mla, with --teacher and --budget; RUNS/NAME/recipe.yaml says what was chosen"
    )
    parser.add_argument("--target", type=str | None, help=target)
    parser.add_argument(
        "--budget", type=float | None, help="with --target: KV budget, cached bytes of student / teacher"
    )
    context = "with --budget: at so many tokens; default 32k, or the teacher's limit"
    parser.add_argument("--context", type=int | None, help=context)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _fields_of_targets() -> str:
    """With their defaults, where they have one."""
    found = []
    for name, target in TARGETS.items():
        each = (f.name if f.default is MISSING else f"{f.name} ({f.default})" for f in fields(target.config_class))
        found.append(f"{name}: {', '.join(each)}")
    return "; ".join(found)


def _check_mappings(config: Namespace) -> None:
    for name in ("stage1", "stage2", "evaluation", "trainer", "data", "stage1.options", "stage2.options"):
        if not isinstance(value := config.get(name), Namespace | dict):
            raise invalid(name, value, "must be a mapping; null takes away single fields of it")


def read_recipe(parser: ArgumentParser, config: Namespace) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that was parsed, and what it says of the data.

    Raises:
        UserError: a value that is out of range.
    """
    _check_mappings(config)
    ready = parser.instantiate_classes(config)
    return Recipe(**{field.name: getattr(ready, field.name) for field in fields(Recipe)}), dict(ready.data)


def as_plain(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """The resolved recipe as plain data: what recipe.yaml, MLflow and the check for a changed recipe see."""
    _check_mappings(config)
    plain = yaml.safe_load(parser.dump(config, skip_none=False))
    for stage in ("stage1", "stage2"):  # run folders begun before there were phases go on
        if not plain[stage].get("phases"):
            plain[stage].pop("phases", None)
    for owner, name in (
        (plain, "targets"),
        (plain, "trainer"),
        (plain["stage1"], "options"),
        (plain["stage2"], "options"),
    ):
        owner[name] = {
            key: value for key, value in (owner[name] or {}).items() if value is not None
        }  # those taken away
    return {name: value for name, value in plain.items() if name not in PLACE_FIELDS}
