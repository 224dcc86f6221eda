"""How both stages are validated: the whole student against the teacher, and each new attention on the teacher's path."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from pl_attnedit.attention import Target
from pl_attnedit.distillation.engine.pairs import Batch
from pl_attnedit.distillation.metrics import Fidelity, LayerNMSE
from pl_attnedit.distillation.optimisation import OptimisedModule

TeacherHidden = dict[tuple[str, int], torch.Tensor]  # by text, dtype and validation batch, in host memory


class ValidatedModule(OptimisedModule):
    """Base of `DistillationModule`, which has the models."""

    teacher: Any

    def __init__(self) -> None:
        super().__init__()
        self.fidelity = Fidelity()
        self.layer_nmse: LayerNMSE | None = None
        # the teacher's last hidden states on the held-out text, the same at every validation
        self.teacher_hidden: TeacherHidden = {}

    def layer_modules(self) -> dict[int, Target]:
        """The new attention modules by layer index; in the subclass."""
        raise NotImplementedError

    def _sum_exactly(self, device: torch.device) -> None:
        """Sums of validation are float64; NPUs have none worth the name."""
        for metric in (self.fidelity, self.layer_nmse):
            assert metric is not None
            metric.set_dtype(torch.float32 if device.type == "npu" else torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        data, key = getattr(self.trainer, "datamodule", None), None
        if hasattr(data, "fingerprint") and self.trainer.world_size == 1 and batch_idx >= self.hparams["nmse_batches"]:
            key = (f"{data.fingerprint} {len(batch['input_ids'])} {self.teacher.dtype}", batch_idx)  # type: ignore[union-attr]
        known = None if key is None else self.teacher_hidden.get(key)
        self.pairs(self._validate, batch, batch_idx, key, known)

    def _validate(self, batch: Batch, batch_idx: int, key: tuple[str, int] | None, known: torch.Tensor | None) -> None:
        assert self.layer_nmse is not None
        teacher, student, calls = self.pairs.begin(batch)
        rows, edited = self._rows_of_its_own(batch, batch_idx), list(self.layer_modules())
        for index, (pair, call) in enumerate(self.pairs.with_calls(calls)):
            if known is not None:
                student = pair.run_student(student, call)
                continue
            states, student = pair(teacher, student, call)
            teacher = states.output
            if pair.attention is not None and batch_idx < self.hparams["nmse_batches"]:
                output = pair.attention(states.attention_input, states.attention_call)
                self.layer_nmse.update(edited.index(index), output[:rows], states.attention_output[:rows])
        if known is not None:
            teacher = known.to(self.device)
        elif key is not None:
            self.teacher_hidden[key] = teacher.cpu()
        update = partial(self.fidelity.update, input_ids=batch["input_ids"][:rows], mask=batch["loss_mask"][:rows])
        self.pairs.heads(teacher[:rows], student[:rows], update)

    def _rows_of_its_own(self, batch: Batch, batch_idx: int) -> int:
        """How many of a validation batch's sequences count: with several processes the sampler repeats the first ones, so
        that all have as many."""
        rows, loader = len(batch["input_ids"]), self.trainer.val_dataloaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return rows
        own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
        return min(rows, max(0, own - batch_idx * loader.batch_size))  # type: ignore[union-attr]

    def on_validation_epoch_end(self) -> None:
        assert self.layer_nmse is not None
        per_layer = self.layer_nmse.compute().reshape(-1)  # torchmetrics takes the dimension off a single layer's
        values = {f"val/{name}": value for name, value in self.fidelity.compute().items()}
        values |= {f"val/nmse/layer_{i:02d}": per_layer[k] for k, i in enumerate(self.layer_modules())}
        values["val/nmse"] = per_layer.mean()
        self.fidelity.reset()
        self.layer_nmse.reset()
        self.log("step", float(self.global_step))  # Lightning's own count is one less here
        self.log_dict({name: value.float() for name, value in values.items()}, sync_dist=False)
