"""Inits of GateSWA: the teacher's own weights, or random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pl_attnedit.attention.base import Init, copy_linear, init_linear
from pl_attnedit.attention.gate_swa.module import GateSWA


def init_random(target: GateSWA, source: Any, statistics: None = None) -> None:
    """Random projections; `o_proj` is the teacher's."""
    for linear in (target.q_proj, target.k_proj, target.v_proj):
        init_linear(linear, target.spec.initializer_range)
    if target.spec.qk_norm:
        nn.init.ones_(target.q_norm.weight)
        nn.init.ones_(target.k_norm.weight)
    _inherit_output(target, source)


@torch.no_grad()
def init_copy(target: GateSWA, source: Any, statistics: None = None) -> None:
    """The teacher's projections and norms."""
    for name in ("q_proj", "k_proj", "v_proj"):
        copy_linear(getattr(target, name), getattr(source, name))
    if target.spec.qk_norm:
        target.q_norm.weight.copy_(source.q_norm.weight)
        target.k_norm.weight.copy_(source.k_norm.weight)
    _inherit_output(target, source)


@torch.no_grad()
def _inherit_output(target: GateSWA, source: Any) -> None:
    copy_linear(target.o_proj, source.o_proj)
    if target.target.gate != "none":
        nn.init.zeros_(target.gate_proj.weight)
        target.o_proj.weight.mul_(2.0)  # the gate is 1/2; it does not scale the bias
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
