"""What both stages share: how teacher and student are built, placed and sharded, and what a checkpoint holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.attention import Target
from pl_attnedit.checkpoints.io import read_checkpoint, use_atomic_files
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.distillation.engine.pairs import Pairs
from pl_attnedit.distillation.engine.sharding import broadcast, data_parallel_mesh, shard
from pl_attnedit.distillation.metrics import LayerNMSE
from pl_attnedit.distillation.settings import (
    check_hyperparameters,
    frozen_dtype,
    parse_targets,
    plain_targets,
    trained_dtype,
)
from pl_attnedit.distillation.validation import ValidatedModule
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.modeling import EditPlan, edited_attention, unshare_trunk
from pl_attnedit.modeling.calibration import Reported
from pl_attnedit.modeling.edit import assemble, build_plan, check_teacher, initialise, layers_that_need_text
from pl_attnedit.modeling.trained_on import KEY as TRAINED_ON
from pl_attnedit.modeling.trained_on import TrainedOn
from pl_attnedit.modeling.weights import copy_weights, default_dtype
from pl_attnedit.shapes import SHAPE_PREFIX
from pl_attnedit.teachers.base import rotary_of
from pl_attnedit.teachers.sources.resolve import load_teacher, teacher_fingerprint

# a checkpoint's optimizer state fits these values only
OPTIMIZER_SETTINGS = ("train", "learning_rate", "weight_decay")


class DistillationModule(ValidatedModule):
    """Base of the two stages.

    Only what trains is in the module tree, so checkpoints and the optimiser hold only that. Teacher and frozen trunk are
    kept outside of it, where Lightning does not see them; this class moves them and keeps them in eval mode.

    Args:
        teacher: hub name, folder, GGUF file, `package:NAME` or `shape:NAME` of the teacher.
        targets: the target for each pattern letter, e.g. `{S: {type: gate_swa, window: 512}}`; or one target alone.
        pattern: letters repeated over the layers, F = full layer. Default: the target's own.
        layers: explicit indices of the layers to edit, instead of a pattern.
        init: random | copy | calibrated | plain_svd, see `edit_model`.
        calibration_tokens: tokens of the training text used by the inits calibrated and plain_svd.
        init_from: folder of a converted model to take the weights from, instead of `init`. `--ckpt_path` instead resumes a
            training: it also restores optimiser, step and position in the data.
        dtype: dtype of the teacher, of frozen weights and of the saved student; bfloat16 needs `precision: bf16-mixed`.
            Weights that train and their optimiser states are at least float32.
        compiled: run the layers through torch.compile. Default: on a GPU. Not on an NPU.
        cuda_graph: record a training step as a CUDA graph and replay it, on one GPU. Faster for small models, whose time
            goes into kernel launches. The graph keeps the memory of a step allocated.
        learning_rate: peak of the schedule; phases of the data have their own rates.
        warmup_steps: optimiser steps of linear warm-up; a cosine to `final_lr_share` follows until the last step.
        final_lr_share: learning rate at the last step as a share of the peak (with phases, of the last phase's rate).
        weight_decay: of AdamW, on matrices only.
        nmse_batches: validation batches on which the error of each layer is measured too.
    """

    stage: str  # set by the subclasses

    def __init__(
        self,
        teacher: str,
        targets: dict[str, Any],
        pattern: str | None = None,
        layers: list[int] | None = None,
        init: str = "calibrated",
        calibration_tokens: int = 16384,
        init_from: str | None = None,
        dtype: str = "float32",
        compiled: bool | None = None,
        cuda_graph: bool = False,
        learning_rate: float = 1e-3,
        warmup_steps: int = 10,
        final_lr_share: float = 0.1,
        weight_decay: float = 0.0,
        nmse_batches: int = 2,
    ) -> None:
        super().__init__()
        self.target_configs = parse_targets(targets)
        self.save_hyperparameters()
        self.hparams["targets"] = plain_targets(self.target_configs)  # plain data, for checkpoints
        check_hyperparameters(self.hparams)
        # (teacher, student), in a tuple so that nn.Module does not register them
        self._held: tuple[PreTrainedModel, PreTrainedModel] | None = None
        self._pairs: tuple[Pairs] | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.fingerprint: str | None = None
        self.trained_before = TrainedOn()  # the text that the student given by `init_from` was trained on
        self.resuming = False  # set by the caller: the Trainer looks for a checkpoint only after the models are built
        self.sharded = False  # by FSDP2, which has put the parameters on the devices

    @property
    def teacher(self) -> Any:
        assert self._held is not None, "configure_model has not run"
        return self._held[0]

    @property
    def student(self) -> Any:
        assert self._held is not None, "configure_model has not run"
        return self._held[1]

    @property
    def pairs(self) -> Pairs:
        """Teacher and student, paired layer by layer."""
        if self._pairs is None:
            recompute = self.hparams.get("activation_checkpointing", False)
            options = {"recompute": recompute, "block_loss": self.hparams.get("supervise") == "block"}
            self._pairs = (Pairs(self.teacher, self.student, compiled=self.compiled, **options),)
        return self._pairs[0]

    @property
    def plan(self) -> EditPlan:
        return self.student.edit_plan

    @property
    def compiled(self) -> bool:
        """Whether the layers run through torch.compile."""
        chosen = self.hparams["compiled"]
        if chosen and self.device.type == "npu":
            raise invalid("compiled", chosen, "torch.compile is not used on an NPU: leave it out")
        return self.device.type == "cuda" if chosen is None else chosen

    def configure_model(self) -> None:
        """Builds teacher and student once. A run that resumes skips the init, its weights come from the checkpoint."""
        if self._trainer is not None:
            use_atomic_files(self.trainer.strategy)  # reads sharded checkpoints under every strategy
        if self._held is None:
            with default_dtype(torch.float32):  # `64-true` changes the default
                self._build()
        if self.sharded:
            self._prepare_for_shards()

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Dtype of the teacher, of frozen weights and of the saved student."""
        if self._trainer is None:
            return getattr(torch, self.hparams["dtype"])
        return frozen_dtype(self.trainer.precision, self.hparams["dtype"])

    def _build(self) -> None:
        hparams, dtype = self.hparams, trained_dtype(self.frozen_dtype)
        teacher, self.tokenizer, self.fingerprint = self.find_teacher(self.frozen_dtype)
        teacher.requires_grad_(False)
        check_teacher(teacher)
        plan = build_plan(teacher.config, self.target_configs, hparams["pattern"], hparams["layers"])
        plan.require_edits()
        student = assemble(teacher, plan)
        student.requires_grad_(False)
        for attention in edited_attention(student).values():
            attention.to(dtype)
        if hparams["init_from"] is not None:  # also when resuming: its trunk may not be in the checkpoint
            init_from = Path(hparams["init_from"]).expanduser()
            copy_weights(student, init_from, dtype)
            if self._trainer is not None:
                self._leave_out(TrainedOn.of_folder(init_from))
        elif self.resuming:
            initialise(student, teacher, "random", None)
        else:
            self._initialise(student, teacher)
        if self._trainer is not None and self.trainer.world_size > 1:
            for attention in edited_attention(student).values():  # a random init differs between processes
                broadcast(attention, self.trainer.strategy.root_device)
        if self._trainer is not None and data_parallel_mesh(self) is None:
            for model in (teacher, student):
                model.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
        check_forward(teacher, student)  # unsharded
        self._held = (teacher, student)
        self.layer_nmse = LayerNMSE(len(plan.edited_layers))
        if self._trainer is not None:
            self._sum_exactly(self.trainer.strategy.root_device)
        self.prepare_training()
        self._shard()

    def _shard(self) -> None:
        """Under FSDP2, shards teacher and student, before optimisers are made of their parameters."""
        mesh = None if self._trainer is None else data_parallel_mesh(self)
        if mesh is None:
            return
        self.sharded = True
        shard(self.pairs, mesh, str(self.trainer.precision), gather_once=self.stage == "stage1")

    def _prepare_for_shards(self) -> None:
        for loop in (self.trainer.validate_loop, self.trainer.fit_loop.epoch_loop.val_loop):
            loop.inference_mode = False  # weights gathered in inference mode could not be used in training
        if path := self.trainer.ckpt_path:  # Lightning would load weights before it checks what they belong to
            self.on_load_checkpoint(read_checkpoint(path, tensors=False))

    def find_teacher(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
        """The teacher with its tokenizer and fingerprint."""
        source = self.hparams["teacher"]
        here = source.startswith(SHAPE_PREFIX) and self._trainer is not None
        device = self.trainer.strategy.root_device if here else "cpu"  # what is read may be sharded part by part
        return *load_teacher(source, dtype, device), teacher_fingerprint(source)

    def _leave_out(self, trained: TrainedOn) -> None:
        """Takes text that the student was trained on out of the held-out documents."""
        self.trained_before |= trained
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "leave_out"):
            data.leave_out(self.trained_before)

    def trained_on(self) -> TrainedOn:
        """The text that this student was trained on, here and in the runs whose student it started from."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        own = getattr(data, "training_documents", TrainedOn(complete=False))
        return self.trained_before | own

    def _initialise(self, student: Any, teacher: Any) -> None:
        calibration, init = None, self.hparams["init"]
        if layers_that_need_text(student, init):
            data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
            if not hasattr(data, "calibration_batches"):
                raise UserError(f"init = {init!r}: this target needs a TextDataModule to calibrate on")
            batches = data.calibration_batches(self.hparams["calibration_tokens"])  # type: ignore[union-attr]
            report = getattr(self.trainer.progress_bar_callback, "report", None)
            calibration = batches if report is None else Reported(batches, partial(report, "calibrating"))
            teacher.to(self.trainer.strategy.root_device)
            student.to(self.trainer.strategy.root_device)
        initialise(student, teacher, init, calibration)

    def prepare_training(self) -> None:
        """Registers the modules that train; in the subclasses."""
        raise NotImplementedError

    def register_trained(self, attention: dict[int, Target]) -> None:
        """Puts new attention modules by layer index into the module tree. All require gradients from the start; a callback
        that freezes a layer drops its gradients before the optimiser step, since DDP would never reduce it otherwise."""
        self.attention = nn.ModuleDict({str(index): module for index, module in attention.items()})
        self.attention.requires_grad_(True)

    def unshare(self) -> None:
        """Makes the whole student trainable: copies the trunk for it and puts the student into the module tree."""
        unshare_trunk(self.student)
        self.student.to(trained_dtype(self.frozen_dtype))
        self.student.requires_grad_(True)
        self.student_model = self.student

    def on_fit_start(self) -> None:
        self._place()

    def on_validation_start(self) -> None:
        self._place()

    def _place(self) -> None:
        self._sum_exactly(self.device)
        self.teacher.eval()
        for model in (self.teacher, self.student):
            rotary = rotary_of(model.model)
            if rotary is not None and {b.dtype for b in rotary.buffers()} - {torch.float32}:  # by `64-true`
                rotary._buffers = type(rotary)(config=model.config)._buffers
            if rotary is not None:
                rotary.to(self.device)
            if not self.sharded:
                model.to(self.device)

    def layer_modules(self) -> dict[int, Target]:
        """The new attention modules by layer index."""
        return edited_attention(self.student)

    # checkpoints

    def _identity(self) -> dict[str, Any]:
        return {"stage": self.stage, "teacher": self.fingerprint, "plan": self.plan.to_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pl_attnedit"] = {**self._identity(), TRAINED_ON: self.trained_on().to_checkpoint()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get("pl_attnedit")
        if not isinstance(found, dict):
            raise UserError("checkpoint: is not one of pl_attnedit; give one that `fit` or `convert` wrote")
        found = {**found, "plan": EditPlan.from_dict(found["plan"]).to_dict()}  # fields added since: their defaults
        for name, wanted in self._identity().items():
            if found.get(name) != wanted:
                raise UserError(f"checkpoint: was written for the {name} {found.get(name)!r}, this run has {wanted!r}")
        settings = checkpoint.get("hyper_parameters", {})
        for name in OPTIMIZER_SETTINGS:
            now = self.hparams.get(name)
            if name in settings and settings[name] != now:
                other = f"was trained with {name} {settings[name]!r}, this run has {now!r}"
                raise UserError(f"checkpoint: {other}; to change that, start anew with init_from")
        if self._trainer is not None:
            self._leave_out(TrainedOn.of_checkpoint(checkpoint["pl_attnedit"]))
