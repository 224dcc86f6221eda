"""Inits of Gated DeltaNet."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pl_attnedit.attention.base import Init, check_as_teachers, copy_linear, init_linear, set_linear, solve
from pl_attnedit.attention.gated_deltanet.module import GatedDeltaNet, GatedDeltaNetConfig
from pl_attnedit.attention.statistics import LayerStatistics
from pl_attnedit.errors import UserError
from pl_attnedit.teachers import AttentionSpec, output_projection

INPUT = 0.1  # root mean square of what enters the convolution, so that its SiLU does little more than halve
GATE = 0.5  # input of the gate's SiLU, where that is 0.31 and its slope 0.74
HALF_LIVES = 2.0, 64.0  # tokens after which half of a state is left: of the first and the last head


@torch.no_grad()
def init_random(target: GatedDeltaNet, source: Any, statistics: None = None) -> None:
    """As Gated DeltaNets are trained from nothing; the output projection is the teacher's where it fits."""
    init_linear(target.in_proj_qkvz, target.spec.initializer_range)
    init_linear(target.in_proj_ba, target.spec.initializer_range)
    nn.init.kaiming_uniform_(target.conv1d.weight, a=math.sqrt(5))
    nn.init.uniform_(target.A_log, 0.01, 16.0).log_()
    set_decay(target, torch.empty_like(target.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp())
    nn.init.ones_(target.norm.weight)
    output = output_projection(source)
    if output.weight.shape == target.out_proj.weight.shape:
        copy_linear(target.out_proj, output)
    else:
        init_linear(target.out_proj, target.spec.initializer_range)


def set_decay(target: GatedDeltaNet, rate: torch.Tensor) -> None:
    """Sets `dt_bias` so that the decay of each head is -exp(A_log) * rate where its input is 0."""
    target.dt_bias.copy_(rate + torch.log(-torch.expm1(-rate)))  # the inverse of softplus


def check_calibrated(config: GatedDeltaNetConfig, spec: AttentionSpec) -> None:
    """`UserError` for shapes other than the teacher's, and for teachers of which the statistics say nothing."""
    own = {"heads": spec.num_heads, "key_dim": spec.head_dim, "value_dim": spec.value_dim}
    check_as_teachers(config, "calibrated", **own)
    if not spec.rope_pairs or spec.head_dim != spec.value_dim:
        raise UserError(
            "init calibrated: knows teachers with a RoPE whose keys and values are of one width; use init random"
        )


@torch.no_grad()
def init_calibrated(target: GatedDeltaNet, source: nn.Module, statistics: LayerStatistics) -> None:
    """The teacher's queries, keys and values as linear functions of the layer's input, each scaled to `INPUT`.

    The convolution passes each token on. Gates are as near to `GATE` as a linear function of the input can come. Beta is
    1/2, and decays do not depend on the input yet. Each head's output is as large as the teacher's is on average.
    """
    spec, heads = target.spec, target.heads
    width = spec.hidden_size + (1 if spec.qkv_bias else 0)
    plain = statistics.plain_xx[:width, :width]
    query = solve(plain, statistics.xq[:width]).T.unflatten(0, (heads, -1))
    key_value = solve(statistics.weighted_xx[:width, :width], statistics.weighted_xkv[:width]).T
    key, value = key_value.unflatten(0, (2, spec.num_kv_heads, -1)).repeat_interleave(heads // spec.num_kv_heads, dim=1)
    query, key = (each[:, rope_order(statistics, each.shape[1])] for each in (query, key))
    constant = solve(plain, statistics.plain_xx[:width, -1:]).T  # its product with an input is near 1
    gate = GATE * constant.expand(heads, target.value_dim, -1)
    scaled = [INPUT * each / root_mean_square(each, plain) for each in (query, key, value)]
    set_linear(target.in_proj_qkvz, torch.cat([*scaled, gate], dim=1).flatten(0, 1))
    nn.init.zeros_(target.in_proj_ba.weight)
    nn.init.zeros_(target.conv1d.weight)
    target.conv1d.weight[..., -1] = 1.0
    nn.init.zeros_(target.A_log)
    first, last = map(math.log10, HALF_LIVES)
    half_lives = torch.logspace(first, last, heads, device=target.dt_bias.device)
    set_decay(target, math.log(2) / half_lives)
    nn.init.ones_(target.norm.weight)
    copy_linear(target.out_proj, output_projection(source))
    opened = GATE / (1 + math.exp(-GATE))  # the norm's output is 1 in the root mean square, times this
    share = (statistics.output / opened).repeat_interleave(target.value_dim)
    target.out_proj.weight.mul_(share.to(target.out_proj.weight))


def root_mean_square(maps: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Of the products of (heads, outputs, width) with inputs of this second moment, for each head: (heads, 1, 1)."""
    return ((maps @ moment) * maps).sum(-1).mean(-1).sqrt()[:, None, None]


def rope_order(statistics: LayerStatistics, width: int) -> torch.Tensor:
    """(width,) entries of a head in the statistics' order, so that `GatedDeltaNet.turn` gives each pair its frequency."""
    half = width // 2
    turned = statistics.frequencies != 0
    slot = (statistics.frequencies[:, None] - statistics.offered[None]).abs().argmin(1)
    pair = torch.full((half,), -1, device=slot.device)
    pair[slot[turned]] = turned.nonzero().flatten()
    pair[pair < 0] = (~turned).nonzero().flatten()
    return torch.cat([pair, pair + half])


CALIBRATED = Init(init_calibrated, needs_text=True, needs_outputs=True, check=check_calibrated)
INITS = {"random": Init(init_random), "calibrated": CALIBRATED}
