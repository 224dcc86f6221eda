"""Inits of MLA."""

from __future__ import annotations

from typing import Any

from torch import nn

from pl_attnedit.attention.base import Init, copy_linear, init_linear
from pl_attnedit.attention.mla.calibrated import check_calibrated, init_calibrated
from pl_attnedit.attention.mla.module import MLA
from pl_attnedit.attention.mla.plain_svd import check_plain_svd, init_plain_svd
from pl_attnedit.teachers import output_projection


def init_random(mla: MLA, source: Any, statistics: None = None) -> None:
    """Random weights as in the paper; `o_proj` is the teacher's."""
    for module in mla.modules():
        if isinstance(module, nn.Linear):
            init_linear(module, mla.spec.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    copy_linear(mla.o_proj, output_projection(source))


INITS = {
    "random": Init(init_random),
    "calibrated": Init(init_calibrated, needs_text=True, check=check_calibrated),
    "plain_svd": Init(init_plain_svd, needs_text=True, check=check_plain_svd),
}
