"""Attention on Ascend NPUs: the fused operator of torch_npu, and the switch between it and PyTorch's own attention.

What `torch_npu.npu_fusion_attention` takes, from its documentation (Ascend op-plugin, torch_npu-npu_fusion_attention.md):
- `input_layout="BNSD"`: (batch, heads, time, width), all of one dtype; the number of key heads divides that of query heads;
  keys and values have one shape, at most 768 wide. It is meant for training.
- `atten_mask`: True = hidden, the opposite of PyTorch's. None = all keys are visible, for every `sparse_mode`.
- `sparse_mode` says what the mask is. 1: the whole mask, (batch or 1, heads or 1, queries, keys). 2: causal from the upper
  left corner. 4: a band from `pre_tockens` before the diagonal, which ends in the lower right corner, to `next_tockens`
  behind it. 2 and 4 do not take the mask itself but the upper triangle of 2048 x 2048, at any length.
- Seven outputs, the first of them the attention's; differentiable.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pl_attnedit.attention.kernels.autocast import to_autocast
from pl_attnedit.errors import invalid

SWITCH = "PL_ATTNEDIT_NPU_ATTENTION"  # environment variable
KERNELS = {"fused": "torch_npu.npu_fusion_attention", "sdpa": "torch.nn.functional.scaled_dot_product_attention"}


def npu_kernel() -> str:
    """The switch: "fused" (default) or "sdpa", from the environment variable PL_ATTNEDIT_NPU_ATTENTION."""
    chosen = os.environ.get(SWITCH, "fused")
    if chosen not in KERNELS:
        raise invalid(SWITCH, chosen, f"must be one of {', '.join(KERNELS)}")
    return chosen


def takes_fused(query: Tensor) -> bool:
    """Whether queries (batch, heads, queries, width) go to the fused operator; a single one, which is decoding, does not."""
    return query.device.type == "npu" and query.shape[2] > 1 and npu_kernel() == "fused"


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int | None = None
) -> Tensor:
    """Scaled dot-product attention by `torch_npu.npu_fusion_attention`.

    query (batch, heads, queries, width), key and value (batch, kv_heads, keys, width). mask boolean, True = visible,
    (batch or 1, heads or 1, queries, keys), or None = causal: query t sees the keys up to t, with a `window` only the last
    `window` of them. Returns (batch, heads, queries, width).
    """
    import torch_npu

    query, key, value = to_autocast(query, key, value)  # normed keys may be float32 and values not
    masking: dict[str, Any]
    if mask is not None:
        masking = {"atten_mask": ~mask.expand(-1, -1, query.shape[2], key.shape[2]), "sparse_mode": 1}
    else:
        masking = {"atten_mask": _triangle(query.device), "sparse_mode": 2}
    if window is not None:
        masking |= {"sparse_mode": 4, "pre_tockens": window - 1, "next_tockens": 0}
    heads = query.shape[1]
    outputs = torch_npu.npu_fusion_attention(query, key, value, heads, "BNSD", scale=scale, **masking)
    return outputs[0]


@lru_cache(maxsize=8)
def _triangle(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later backward pass could not keep what a validation has made
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
