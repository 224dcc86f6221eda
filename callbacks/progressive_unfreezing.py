"""Which edited layers, or which parts of the student, train when."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import Parameter

from pl_attnedit.attention import Target
from pl_attnedit.errors import invalid
from pl_attnedit.modeling.plan import FULL
from pl_attnedit.modeling.ranking import Sensitivity

Order = Literal["all", "bottom_up", "top_down", "parts"]
ORDERS = ("all", "bottom_up", "top_down", "parts")


class ProgressiveUnfreezing(Callback):
    """Unfreezes one more group every `steps_per_group` optimiser steps.

    The state is a function of `global_step`, so a resumed run goes on as if it had never stopped. A frozen parameter
    keeps `requires_grad`; its gradient is dropped before the optimiser step. (DDP never reduces parameters that are unfrozen
    after wrapping.)

    Args:
        order: "bottom_up" or "top_down" over the edited layers, a list of layer indices in the order wanted, a .json file of
            `pl-attnedit sensitivity` (most sensitive layer first; it is not checked that the scores are of this teacher and
            target), "parts" = new attention, then all norms, then the rest of the trunk, "all" = everything from the start.
        layers_per_group: edited layers that are unfrozen together; not for "parts".
        steps_per_group: optimiser steps between two groups.
    """

    def __init__(
        self, order: Order | list[int] | str = "bottom_up", layers_per_group: int = 1, steps_per_group: int = 100
    ) -> None:
        if not isinstance(order, list) and order not in ORDERS and not order.endswith(".json"):
            allowed = f"must be one of {', '.join(ORDERS)}, a list of layer indices, or a .json file of sensitivities"
            raise invalid("order", order, allowed)
        if layers_per_group < 1:
            raise invalid("layers_per_group", layers_per_group, "must be at least 1")
        if steps_per_group < 1:
            raise invalid("steps_per_group", steps_per_group, "must be at least 1")
        self.order, self.layers_per_group, self.steps_per_group = order, layers_per_group, steps_per_group
        self._groups: list[list[Parameter]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.order == "parts":
            self.check(pl_module, pl_module.plan.letters)
            self._groups = self._by_parts(pl_module)
        else:
            self._groups = self._by_layers(pl_module.layer_modules(), self.layer_order(pl_module.plan.letters))

    def check(self, pl_module: Any, letters: str) -> None:
        """`UserError` for an order that does not fit a stage, built or not, and the letters of its plan."""
        if self.order != "parts":
            self.layer_order(letters)
        elif getattr(pl_module, "train_parts", "attention") == "attention":
            raise invalid("order", self.order, "needs a stage that trains the trunk: set `train: all` in stage 2")

    def layer_order(self, letters: str) -> list[int]:
        """The edited layers of a plan (a letter for each layer), in the order of their unfreezing."""
        edited = [index for index, letter in enumerate(letters) if letter != FULL]
        if self.order == "top_down":
            return edited[::-1]
        if isinstance(self.order, str) and self.order.endswith(".json"):
            return Sensitivity.read(self.order).order(letters)
        if isinstance(self.order, list):
            if sorted(self.order) != edited:
                raise invalid("order", self.order, f"must list each edited layer once: {edited}")
            return self.order
        return edited

    def unfrozen_groups(self, global_step: int) -> int:
        """How many groups train at an optimiser step."""
        return min(1 + global_step // self.steps_per_group, len(self._groups))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        unfrozen = self.unfrozen_groups(trainer.global_step)
        pl_module.log("train/unfrozen_groups", float(unfrozen))
        for group in self._groups[unfrozen:]:
            for parameter in group:
                parameter.grad = None

    def _by_layers(self, modules: dict[int, Target], order: list[int]) -> list[list[Parameter]]:
        size = len(order) if self.order == "all" else self.layers_per_group
        return [
            [p for index in order[start : start + size] for p in modules[index].parameters()]
            for start in range(0, len(order), size)
        ]

    def _by_parts(self, pl_module: Any) -> list[list[Parameter]]:
        attention = {id(p): p for module in pl_module.layer_modules().values() for p in module.parameters()}
        norms: dict[int, Parameter] = {}
        rest: dict[int, Parameter] = {}
        for name, parameter in pl_module.named_parameters():
            if id(parameter) not in attention:
                (norms if "norm" in name else rest)[id(parameter)] = parameter
        return [list(attention.values()), list(norms.values()), list(rest.values())]
