"""Floating-point operations of a training step, counted from shapes: what the model needs, not what is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pl_attnedit.attention import Target
from pl_attnedit.attention.base import visible_on_average
from pl_attnedit.eval.bench.timing import median_seconds
from pl_attnedit.modeling import edited_attention
from pl_attnedit.teachers import attention_of, attention_spec, output_projection


def linear_flops(module: nn.Module) -> int:
    """Forward FLOPs per token of the linear layers in a module; of a mixture's experts, of those that a token goes to."""
    dense = sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
    return dense + sum(_mixture_flops(m) for m in module.modules() if is_mixture(m))


def is_mixture(module: nn.Module) -> bool:
    """Whether this is a mixture of experts: its router says how many of the stacked weights a token goes to."""
    return hasattr(router_of(module), "top_k")


def router_of(module: Any) -> Any:
    """The router of a mixture of experts, by the names that Hugging Face's families have for it."""
    return getattr(module, "gate", None) or getattr(module, "router", None)


def mixture_of(layer: nn.Module) -> Any:
    """The mixture of experts in a decoder layer, or None."""
    return next((module for module in layer.modules() if is_mixture(module)), None)


def _mixture_flops(mixture: Any) -> int:
    router = router_of(mixture)
    stacked = [p for p in mixture.parameters() if p.dim() == 3]  # experts first
    return 2 * (sum(p.numel() * router.top_k // len(p) for p in stacked) + sum(p.numel() for p in router.parameters()))


def score_flops(attention: Any, config: Any, seq_len: int) -> float:
    """Forward FLOPs per token of scores and weighted values; causal, so half of the square, or what is seen of it. Of a
    target, of what it has in their place."""
    if attention is None:
        return 0.0
    if isinstance(attention, Target):
        return attention.mixing_flops(seq_len)
    spec = attention_spec(config, attention.layer_idx)
    return 2 * visible_on_average(spec.window or seq_len, seq_len) * spec.num_heads * (spec.head_dim + spec.value_dim)


def step_flops(
    teacher: Any,
    student: Any,
    *,
    stage: str,
    trained: str,
    seq_len: int,
    block_loss: bool = False,
    train_layers: Sequence[int] | None = None,
) -> float:
    """FLOPs per token of one step.

    stage1: the teacher's layers forward, up to the attention of the last one that trains; each new attention that trains
    (`train_layers`, None = all) forward and backward, without the gradient of its input; with `block_loss` the MLP behind
    it too, without weight gradients.
    stage2: teacher forward; student forward and backward, with weight gradients of what is `trained` ("attention", "layers",
    "all"), and none below the first new attention where that alone trains; lm_head of both.
    """
    config = teacher.config
    edited = list(edited_attention(student))
    training = edited if train_layers is None else list(train_layers)
    total = 0.0
    for index, (old, new) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        own = attention_of(new)
        attention, scores = 0 if own is None else linear_flops(own), score_flops(own, config, seq_len)
        rest = linear_flops(new) - attention
        if stage == "stage1" and index > max(training):
            break
        stops_here = stage == "stage1" and index == max(training) and not block_loss
        total += linear_flops(old.self_attn if stops_here else old) + score_flops(attention_of(old), config, seq_len)
        if stage == "stage1":
            if index in training:
                total += 3 * attention - _reading_the_input(own, config.hidden_size) + 3 * scores
                total += 2 * rest if block_loss else 0
        elif trained == "attention" and index < edited[0]:
            total += attention + scores + rest
        else:
            weights = attention if index in edited or trained != "attention" else 0
            total += 2 * attention + weights + 3 * scores + (2 if trained == "attention" else 3) * rest
    if stage == "stage2":
        head = linear_flops(teacher.lm_head)
        total += head + (3 if trained == "all" else 2) * head
    return total


def _reading_the_input(attention: nn.Module, hidden_size: int) -> int:
    """FLOPs per token of the gradient for the input, which stage 1 does not take."""
    output = output_projection(attention)
    readers = [m for m in attention.modules() if isinstance(m, nn.Linear) and m is not output]
    return sum(2 * m.in_features * m.out_features for m in readers if m.in_features == hidden_size)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data: the median of ten."""
    size = 1536 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, repeats=10)
