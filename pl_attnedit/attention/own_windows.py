"""The windows of a teacher's own layers by the kernels of ours.

Hugging Face makes a mask (batch, 1, n, n) for them, for which SDPA computes all scores, and keeps it for the backward pass.
Here the mask says no more than the window, where that is all there is to say: in whole texts without padding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pl_attnedit.attention.base import OwnWindow, Target, as_bool_mask, attend
from pl_attnedit.attention.kernels.windowed import attend_window, block_mask
from pl_attnedit.teachers import attention_of
from pl_attnedit.teachers.base import goes_through_interface, windows_of

NAME = "attnedit_windows"


def attend_as_teacher(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | OwnWindow | None,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attend` with a mask as a teacher's decoder makes it."""
    if isinstance(mask, OwnWindow):
        return attend_window(query, key, value, mask.window, 0, scale, sink_logit, softcap, mask.blocks)
    return attend(query, key, value, as_bool_mask(mask), scale, sink_logit, softcap)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    sink, softcap = options.get("s_aux"), options.get("softcap")
    if not isinstance(attention_mask, OwnWindow) and sink is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    output = attend_as_teacher(query, key, value, attention_mask, scale, sink, softcap)
    return output.unflatten(-1, (query.shape[1], -1)), None


def _mask(*, config: Any, local_size: int | None = None, **given: Any) -> Tensor | OwnWindow | None:
    """`sdpa_mask`. local_size: a window, or a chunk; it only keeps that function from leaving a mask out."""
    window, tokens = getattr(config, "sliding_window", None), given["q_length"]
    if local_size is None or local_size != window or tokens != given["kv_length"]:
        return sdpa_mask(config=config, local_size=local_size, **given)
    mask = sdpa_mask(config=config, **given)
    return OwnWindow(window, tokens, torch.device(given["device"])) if mask is None and tokens > window else mask


def with_blocks(call: dict[str, Any], device_type: str = "cuda") -> dict[str, Any]:
    """The arguments of a layer that will be compiled: a block mask that is made within would cut its graph in two.

    device_type: where compiled layers take flex_attention."""
    mask = call.get("attention_mask")
    if not isinstance(mask, OwnWindow) or mask.device.type != device_type:
        return call
    return {**call, "attention_mask": mask._replace(blocks=block_mask(mask.tokens, mask.window, 0, mask.device))}


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


def use_own_windows(decoder: Any) -> None:
    """Makes a decoder, in place, run its windows by our kernels, if it has any and these can."""
    if not hasattr(decoder, "layers") or decoder.config._attn_implementation not in ("sdpa", "eager"):
        return
    config, attention = decoder.config, [attention_of(layer) for layer in decoder.layers]
    windows = [module for module, window in zip(attention, windows_of(config)) if window is not None]
    asks = all(isinstance(module, Target) or goes_through_interface(module) for module in windows)
    if not windows or not asks or getattr(config, "attention_dropout", None):  # which our kernels do not have
        return
    own = copy.copy(config)
    own._attn_implementation = NAME
    for module in (decoder, *attention):
        if getattr(module, "config", None) is config:
            module.config = own
