"""Liger's Triton kernels in the trunk, as an option: RMSNorm, SwiGLU and, in the teacher's attention, RoPE.

Their functional forms are bound to the modules that are there; Liger's own way of patching a model replaces the classes of
transformers for the whole process, after which no model runs on a CPU any more.
"""

from __future__ import annotations

import importlib.util
import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pl_attnedit.errors import invalid


def check_installed() -> None:
    """`UserError` where liger-kernel is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise invalid("liger", True, "needs liger-kernel: pip install 'pl_attnedit[gpu]'")


def check_device(device_type: str) -> None:
    """`UserError` where Liger's kernels do not run."""
    if device_type != "cuda":
        raise invalid("liger", True, f"needs a CUDA GPU, this run is on {device_type}")


def use_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Makes a decoder's norms, dense MLPs and rotary embedding run Liger's kernels; a MoE's experts stay as they are.

    The results are the same up to rounding. Modules shared with a student run them there too.

    Raises:
        UserError: liger-kernel is not installed, the device is no GPU, or the MLP's activation is not SiLU.
    """
    check_device(device.type)
    check_installed()
    if model.config.hidden_act != "silu":
        raise invalid("liger", True, f"its SwiGLU needs the activation silu, the teacher has {model.config.hidden_act}")
    decoder: Any = model.model
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = MethodType(_rms_norm, norm)
        if all(hasattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            layer.mlp.forward = MethodType(_swiglu, layer.mlp)
    decoder.norm.forward = MethodType(_rms_norm, decoder.norm)
    # The rotary embedding is a function of the family's file: every other tensor still gets the one that was there.
    family: Any = sys.modules[type(decoder.layers[0]).__module__]
    if not isinstance(family.apply_rotary_pos_emb, _Rotary):
        family.apply_rotary_pos_emb = _Rotary(family.apply_rotary_pos_emb)


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden, norm.weight, norm.variance_epsilon, in_place=False)


def _swiglu(mlp: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return mlp.down_proj(liger_swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


class _Rotary(nn.Module):
    """Liger's RoPE where no gradient is wanted and there is a GPU: it rotates in place."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or torch.is_grad_enabled() or query.device.type != "cuda":
            return self.plain(query, key, cos, sin, *rest, **options)
        from liger_kernel.transformers.functional import liger_rope

        return liger_rope(query, key, cos, sin)
