"""What both stages share: building teacher and student, the optimiser, validation, what a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.attention import Target, TargetConfig, target_from_dict
from pl_attnedit.distillation.metrics import Fidelity, LayerNMSE
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.modeling import EditPlan, edited_attention, load, unshare_trunk
from pl_attnedit.modeling.edit import INITS, Init, assemble, check_teacher, initialise
from pl_attnedit.teachers.source import load_teacher, resolve_teacher, teacher_fingerprint

Batch = dict[str, torch.Tensor]
TeacherHidden = dict[tuple[str, int], torch.Tensor]  # by data fingerprint and validation batch, in host memory


class DistillationModule(LightningModule):
    """Base of the two stages.

    Only what trains is in the module tree, so only that is in checkpoints, is moved by Lightning and has an optimiser
    state. Teacher and trunk are held outside of it; this class moves them and keeps them in eval mode.

    Args:
        teacher: hub name, folder, GGUF file or `package:NAME` of the teacher.
        targets: the target for each pattern letter, e.g. `{S: {type: gate_swa, window: 512}}`; or one target alone.
        pattern: letters repeated over the layers, F = full layer. Default: the target's own.
        layers: explicit indices of the layers to edit, instead of a pattern.
        init: random | copy | calibrated, see `edit_model`.
        calibration_tokens: tokens of the training text that a calibrated init looks at.
        init_from: folder of a converted model whose weights to start from, instead of `init`. Other than resuming with
            `--ckpt_path`, which also restores optimiser, step and place in the data.
        dtype: dtype of all weights.
        learning_rate: peak of the schedule.
        warmup_steps: optimiser steps of linear warm-up; a cosine to `final_lr_share` follows until the last step.
        final_lr_share: learning rate at the last step over the peak.
        weight_decay: AdamW's, on matrices only.
        nmse_batches: validation batches whose per-layer error is measured; the others only count for the whole model's.
    """

    stage: str  # set by the subclasses

    def __init__(
        self,
        teacher: str,
        targets: dict[str, Any],
        pattern: str | None = None,
        layers: list[int] | None = None,
        init: Init = "calibrated",
        calibration_tokens: int = 16384,
        init_from: str | None = None,
        dtype: str = "float32",
        learning_rate: float = 1e-3,
        warmup_steps: int = 10,
        final_lr_share: float = 0.1,
        weight_decay: float = 0.0,
        nmse_batches: int = 2,
    ) -> None:
        super().__init__()
        self.target_configs = parse_targets(targets)
        self.save_hyperparameters()
        if init not in INITS:
            raise invalid("init", init, f"must be one of {', '.join(INITS)}")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise invalid("dtype", dtype, "must be a torch dtype such as float32 or bfloat16")
        if learning_rate <= 0:
            raise invalid("learning_rate", learning_rate, "must be positive")
        # held in a tuple, which nn.Module does not look into: (teacher, student)
        self._held: tuple[PreTrainedModel, PreTrainedModel] | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.fingerprint: str | None = None
        self.fidelity = Fidelity()
        self.layer_nmse: LayerNMSE | None = None
        # the teacher's last hidden states on the held-out text, the same at every validation
        self.teacher_hidden: TeacherHidden = {}

    # building

    @property
    def teacher(self) -> PreTrainedModel:
        assert self._held is not None, "configure_model has not run"
        return self._held[0]

    @property
    def student(self) -> PreTrainedModel:
        assert self._held is not None, "configure_model has not run"
        return self._held[1]

    @property
    def plan(self) -> EditPlan:
        return self.student.edit_plan  # type: ignore[return-value]

    def configure_model(self) -> None:
        """Builds teacher and student once. A run that resumes skips the init: its weights come from the checkpoint."""
        if self._held is not None:
            return
        hparams = self.hparams
        teacher, self.tokenizer = load_teacher(hparams["teacher"], dtype=getattr(torch, hparams["dtype"]))
        self.fingerprint = teacher_fingerprint(resolve_teacher(hparams["teacher"]))
        teacher.requires_grad_(False)
        check_teacher(teacher)
        plan = EditPlan.build(
            teacher.config.num_hidden_layers, self.target_configs, hparams["pattern"], hparams["layers"]
        )
        if not plan.edited_layers:
            raise invalid("pattern", hparams["pattern"], "edits no layer: every letter is F")
        student = assemble(teacher, plan)
        resuming = self._trainer is not None and self.trainer.ckpt_path is not None
        if resuming:
            initialise(student, teacher, "random", None)
        elif hparams["init_from"] is not None:
            copy_weights(student, Path(hparams["init_from"]))
        else:
            self._initialise(student, teacher)
        self._held = (teacher, student)
        self.layer_nmse = LayerNMSE(len(plan.edited_layers))
        self.prepare_training()

    def _initialise(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        calibration = None
        needs = any(attention.needs_statistics for attention in edited_attention(student).values())
        if self.hparams["init"] == "calibrated" and needs:
            data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
            if not hasattr(data, "calibration_batches"):
                raise UserError("init = 'calibrated': this target needs a TextDataModule to calibrate on")
            calibration = data.calibration_batches(self.hparams["calibration_tokens"])  # type: ignore[union-attr]
            teacher.to(self.trainer.strategy.root_device)
            student.to(self.trainer.strategy.root_device)
        initialise(student, teacher, self.hparams["init"], calibration)

    def prepare_training(self) -> None:
        """Registers what trains. All of it requires gradients from the start: what a callback holds back loses its
        gradient before the optimiser step, never its flag."""
        self.attention = nn.ModuleDict({str(i): module for i, module in edited_attention(self.student).items()})
        self.attention.requires_grad_(True)

    def unshare(self) -> None:
        """Makes the whole student trainable: it gets its own copy of the trunk, and joins the module tree."""
        unshare_trunk(self.student)
        self.student.requires_grad_(True)
        self.student_model = self.student

    def on_fit_start(self) -> None:
        self._place()

    def on_validation_start(self) -> None:
        self._place()

    def _place(self) -> None:
        self.teacher.to(self.device).eval()
        self.student.to(self.device)

    def layer_modules(self) -> dict[int, Target]:
        """The new attention modules by layer index."""
        return edited_attention(self.student)

    # optimisation

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.hparams["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.hparams["learning_rate"], betas=(0.9, 0.95)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_share(self, step: int) -> float:
        """Learning rate at a step over the peak."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(self.hparams["warmup_steps"], total)
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        final = self.hparams["final_lr_share"]
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    # validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        data = getattr(self.trainer, "datamodule", None)
        key = (getattr(data, "fingerprint", ""), batch_idx) if self.trainer.world_size == 1 else None
        if batch_idx < self.hparams["nmse_batches"]:
            with TeacherForced(self.teacher, self.layer_modules()) as forced:
                teacher_hidden = last_hidden(self.teacher, batch)
            assert self.layer_nmse is not None
            for place, (index, module) in enumerate(self.layer_modules().items()):
                self.layer_nmse.update(place, forced.student_output(index, module), forced.target(index))
        elif key in self.teacher_hidden:
            teacher_hidden = self.teacher_hidden[key].to(self.device)
        else:
            teacher_hidden = last_hidden(self.teacher, batch)
        if key is not None and key[0]:
            self.teacher_hidden[key] = teacher_hidden.cpu()
        student_hidden = last_hidden(self.student, batch)
        self.fidelity.update(
            student_hidden,
            teacher_hidden,
            self.student.lm_head,
            self.teacher.lm_head,
            batch["input_ids"],
            batch["loss_mask"],
        )

    def on_validation_epoch_end(self) -> None:
        assert self.layer_nmse is not None
        per_layer = self.layer_nmse.compute()
        values = {f"val/{name}": value for name, value in self.fidelity.compute().items()}
        values |= {f"val/nmse/layer_{i:02d}": per_layer[k] for k, i in enumerate(self.layer_modules())}
        values["val/nmse"] = per_layer.mean()
        self.fidelity.reset()
        self.layer_nmse.reset()
        self.log("step", float(self.global_step))  # Lightning's own count is one less here
        self.log_dict({name: value.float() for name, value in values.items()}, sync_dist=False)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pl_attnedit"] = {
            "stage": self.stage,
            "teacher": self.fingerprint,
            "plan": self.plan.to_dict(),
        }


class TeacherForced:
    """Context that records, during a teacher forward, what each edited layer's attention got and gave.

    `student_output` runs a new attention on the very same input: hidden states, rotary embeddings and mask.
    """

    def __init__(self, teacher: PreTrainedModel, modules: dict[int, Target]) -> None:
        self._layers = {index: teacher.model.layers[index].self_attn for index in modules}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._targets: dict[int, torch.Tensor] = {}

    def __enter__(self) -> TeacherForced:
        self._hooks = [
            module.register_forward_hook(self._record(index), with_kwargs=True)
            for index, module in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
            names = ("hidden_states", "position_embeddings", "attention_mask")
            self._inputs[index] = {name: kwargs[name] for name in names}
            self._targets[index] = output[0]

        return hook

    def target(self, index: int) -> torch.Tensor:
        """The teacher's attention output after `o_proj`, before the residual: (batch, time, hidden)."""
        return self._targets[index]

    def student_output(self, index: int, module: Target) -> torch.Tensor:
        """The new attention's output on the teacher's input of that layer: (batch, time, hidden)."""
        return module(**self._inputs[index])[0]


def last_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states after the final norm: (batch, time, hidden)."""
    output = model.model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False)
    return output.last_hidden_state


def parse_targets(targets: Any) -> TargetConfig | dict[str, TargetConfig]:
    """Target configs from YAML: one mapping with `type`, or such a mapping (or a config) for each pattern letter."""
    if isinstance(targets, TargetConfig):
        return targets
    if not isinstance(targets, dict) or not targets:
        raise invalid(
            "targets", targets, "must map pattern letters to targets, e.g. {S: {type: gate_swa, window: 512}}"
        )
    if "type" in targets:
        return target_from_dict(targets)
    return {
        letter: fields if isinstance(fields, TargetConfig) else target_from_dict(fields)
        for letter, fields in targets.items()
    }


@torch.no_grad()
def copy_weights(student: PreTrainedModel, folder: Path) -> None:
    """Weights of a saved converted model into an assembled student; its trunk is taken over only where it differs."""
    saved = load(folder, dtype=next(student.parameters()).dtype)
    if saved.edit_plan != student.edit_plan:
        raise invalid("init_from", str(folder), f"has another edit plan: {saved.edit_plan.to_dict()}")
    device = next(student.parameters()).device
    for index, module in edited_attention(student).items():
        module.load_state_dict(edited_attention(saved)[index].state_dict())
        module.to(device)
    ours = {name: value for name, value in student.state_dict().items() if ".self_attn." not in name}
    theirs = saved.state_dict()
    if any(not torch.equal(value.cpu(), theirs[name]) for name, value in ours.items()):
        unshare_trunk(student)
        student.load_state_dict(theirs)
