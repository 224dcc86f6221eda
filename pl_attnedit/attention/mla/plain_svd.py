"""A plain SVD conversion to MLA, the baseline that published inits improve on.

RoPE key: the mean over the key heads, at the pairs whose frequencies it has. All other pairs: no rotation. Those keys and
the values share the latent by an activation-aware SVD of the stacked projections. QK-norm, attention weights and the norm
of the latent are ignored. Use it to compare other inits with, not for a conversion to keep.
"""

from __future__ import annotations

import torch
from torch import nn

from pl_attnedit.attention.base import check_as_teachers, copy_linear, set_linear
from pl_attnedit.attention.mla.calibrated import low_rank
from pl_attnedit.attention.mla.module import MLA, MLAConfig
from pl_attnedit.attention.statistics import LayerStatistics
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import AttentionSpec, output_projection


def check_plain_svd(config: MLAConfig, spec: AttentionSpec) -> None:
    """`UserError` for widths that the conversion below does not have."""
    check_as_teachers(config, "plain_svd", v_head_dim=spec.head_dim, qk_nope_head_dim=spec.head_dim)
    if config.q_lora_rank is not None:
        raise invalid("q_lora_rank", config.q_lora_rank, "plain_svd has a full-rank query only: leave it out")


@torch.no_grad()
def init_plain_svd(mla: MLA, source: nn.Module, statistics: LayerStatistics) -> None:
    """Sets all weights of `mla` from the teacher's attention `source` and its statistics."""
    spec = mla.spec
    first, second = statistics.order.chunk(2)
    turned = (statistics.frequencies != 0).to(first.device)  # real models have pairs that are 0 in every query
    halves = 2 * len(statistics.offered) == spec.head_dim and bool((second - first == len(first))[turned].all())
    if not hasattr(source, "k_proj") or not halves or not turned.any():
        raise UserError(f"init plain_svd: knows k_proj and a RoPE of Llama's form alone, not {type(source).__name__}'s")
    groups = spec.num_heads // spec.num_kv_heads
    query, key, value = (
        with_bias(getattr(source, name)).unflatten(0, (-1, spec.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    )  # (heads, head_dim, width)
    width = query.shape[-1]
    pairs = mla.frequency_index().to(query.device)
    rotated = torch.stack(
        [pairs, pairs + spec.head_dim // 2], dim=1
    ).flatten()  # half-split in the teacher, interleaved here
    keep = torch.ones(spec.head_dim, 1, dtype=query.dtype, device=query.device)
    keep[rotated] = 0
    stacked = torch.cat([key * keep, value]).flatten(0, 1)
    moment = statistics.plain_xx[:width, :width]
    down, up = low_rank(stacked, moment, mla.rank)  # the SVD in the metric of the inputs
    up = up.unflatten(0, (2 * spec.num_kv_heads, -1))
    nope_up, value_up = up.unflatten(0, (2, -1)).repeat_interleave(groups, dim=1)
    set_linear(
        mla.q_proj, torch.cat([query * keep, query[:, rotated]], dim=1).flatten(0, 1) * spec.scaling / mla.scaling
    )
    set_linear(mla.kv_a_proj_with_mqa, torch.cat([down, key[:, rotated].mean(0)]))
    mla.kv_b_proj.weight.copy_(torch.cat([nope_up, value_up], dim=1).flatten(0, 1))
    if mla.target.latent_norm:
        mla.get_parameter("kv_a_layernorm.weight").fill_(1.0)
    copy_linear(mla.o_proj, output_projection(source))


def with_bias(linear: nn.Linear) -> torch.Tensor:
    """(outputs, inputs [+ 1]) in float64: the bias, where there is one, is the weight of a constant input."""
    weight = linear.weight.double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.double()[:, None]], dim=1)
