"""Inits of GateSWA: the teacher's own weights, or random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pl_attnedit.attention.base import Init, init_linear
from pl_attnedit.attention.gate_swa.module import GateSWA
from pl_attnedit.teachers import output_projection


def init_random(target: GateSWA, source: Any, statistics: None = None) -> None:
    """Random projections; the output projection and what is no projection (norms, the teacher's sinks) are the teacher's."""
    init_copy(target, source)
    output = output_projection(target)
    for name, module in source.named_modules():
        if isinstance(module, nn.Linear) and target.get_submodule(name) is not output:
            init_linear(target.get_submodule(name), target.spec.initializer_range)  # type: ignore[arg-type]


@torch.no_grad()
def init_copy(target: GateSWA, source: Any, statistics: None = None) -> None:
    """The teacher's projections and norms."""
    for name, parameter in source.named_parameters():
        target.get_parameter(name).copy_(parameter)
    if target.target.gate != "none":
        nn.init.zeros_(target.gate_proj.weight)
        output_projection(target).weight.mul_(2.0)  # the gate is 1/2; it does not scale the bias
    if target.sink is not None:
        # SmolLM2, window 64, SSSF, the teacher's weights, 6 x 512 tokens, KL before training: 1.11 without a sink,
        # with -2, 0, 2, 4: 0.92, 0.77, 0.79, 1.26. Perhaps because heads that attended to the
        # first tokens, which are out of the window now, need another place for that weight.
        nn.init.zeros_(target.sink)


INITS = {
    "random": Init(init_random),
    "copy": Init(init_copy),
    "calibrated": Init(init_copy),  # nothing found in text improves on the copy
}
