"""Any family's attention through transformers' attention interface.

A family's attention module makes queries, keys and values in its own way (fused projections, norms, any RoPE or none), hands
them to a function that its config names, and projects what that returns. Here is such a function, `NAME`; it asks the module
itself, by its method `interface`. So scores can be made in another way, or looked at, in any family.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pl_attnedit.errors import UserError

NAME = "attnedit"


def _ask_module(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    return module.interface(query, key, value, attention_mask, **options), None


AttentionInterface.register(NAME, _ask_module)
AttentionMaskInterface.register(NAME, sdpa_mask)


def by_keyword(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a forward pass; args: those behind the hidden states that were given by place."""
    if not args:
        return kwargs
    return {**dict(zip(list(inspect.signature(module.forward).parameters)[1:], args)), **kwargs}


def ask_itself(attention: Any) -> None:
    """Makes an attention module ask its own `interface`; other modules with its config do as before."""
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = NAME


def with_interface(attention: nn.Module, interface: Callable[..., Tensor]) -> Any:
    """A shallow copy of an attention module, with its weights, that has its scores made by another function.

    interface: gets queries (batch, heads, queries, width), keys and values (batch, kv_heads, keys, width), the mask and, as
    keywords, what the family adds: `scaling`, `softcap`, `s_aux` ... Returns (batch, queries, heads, value width).
    """
    shell: Any = copy.copy(attention)
    shell.__dict__["interface"] = interface
    ask_itself(shell)
    return shell


class Heads(NamedTuple):
    """What an attention module hands to the interface."""

    query: Tensor  # (batch, heads, queries, width)
    key: Tensor  # (batch, kv_heads, keys, width)
    value: Tensor
    options: dict[str, Any]


class Enough(Exception):
    """What was wanted of a forward pass is known; nothing later has to run."""


def heads_of(attention: nn.Module, hidden_states: Tensor, call: dict[str, Any]) -> Heads:
    """Queries, keys and values as the scores see them, of a teacher's attention that is called with `call`."""
    seen: list[Heads] = []

    def look(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Tensor:
        seen.append(Heads(query, key, value, options))
        raise Enough

    with suppress(Enough):
        with_interface(attention, look).forward(hidden_states=hidden_states, **call)  # not its hooks
    return seen[0]


def not_turned(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention with a RoPE that turns nothing."""
    cos, sin = call["position_embeddings"]
    return {**call, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def exact_device(device: torch.device) -> torch.device:
    """The device for float64 and linear algebra: the model's, or the CPU for NPUs, which have neither."""
    return torch.device("cpu") if device.type == "npu" else device


class Rotation(NamedTuple):
    """What a layer's RoPE does to the entries of a head, read off what it makes of known cos and sin.

    order (width,): entries so that the second half is what the first turns with: real and imaginary parts. frequencies
    (width / 2,) float64: radians per token of each such pair, 0 where it is not turned. offered (pairs,) float64: all
    frequencies that cos and sin hold. scale: YaRN's factor on scores. columns: where in cos and sin those of the pairs are
    that are turned, which stand first.
    """

    order: Tensor
    frequencies: Tensor
    offered: Tensor
    scale: float
    columns: Tensor

    def turn(self, heads: Tensor, call: dict[str, Any]) -> Tensor:
        """What the layer's RoPE makes of heads (batch, heads, time, width) in `order`, where it is called with `call`."""
        cos, sin = (each[:, None, :, self.columns] for each in call["position_embeddings"])
        turned = len(self.columns)
        real, imaginary = heads.chunk(2, dim=-1)
        (x, still), (y, too) = (each.split([turned, each.shape[-1] - turned], dim=-1) for each in (real, imaginary))
        return torch.cat([x * cos - y * sin, still, y * cos + x * sin, too], dim=-1)


def rotation_of(
    attention: nn.Module, hidden_states: Tensor, call: dict[str, Any], rotary: nn.Module, stride: int, second: int = 1
) -> Rotation:
    """The RoPE of a layer, in whatever form its family writes it, by what it makes of a few inputs.

    rotary: the model's module that makes cos and sin. stride: `AttentionSpec.rope_stride`. second: a token of the first text
    that stands at position 1.

    Raises:
        UserError: entries are not turned in pairs, or something follows the rotation.
    """
    cos, sin = call["position_embeddings"]
    few = slice(0, 64)

    def query(cos: Tensor, sin: Tensor) -> Tensor:
        given = {**call, "attention_mask": None, "position_embeddings": (cos[:1, few], sin[:1, few])}
        return heads_of(attention, hidden_states[:1, few], given).query[0].transpose(0, 1).flatten(0, 1).float()

    one, none = torch.ones_like(cos), torch.zeros_like(sin)
    plain = query(one, none)  # (samples, width)

    def doubled(by: Tensor) -> Tensor:
        """Which entries of a head are multiplied by the entries of cos that are 2: exact in every dtype."""
        return (query(by, none).abs().sum(0) / plain.abs().sum(0)).round() == 2

    entry = torch.zeros(plain.shape[-1], dtype=torch.long, device=cos.device)  # of cos, for each entry of a head
    places = torch.arange(cos.shape[-1], device=cos.device)
    for bit in range(cos.shape[-1].bit_length()):
        entry += doubled(one + (places >> bit & 1).to(cos.dtype)).long() << bit
    exact = exact_device(cos.device)
    turn = torch.atan2(*(each[0, second].to(exact).double() for each in (sin, cos)))[::stride]
    offered, scale = _exact(rotary, turn, cos)
    norm, quarter = plain.norm(dim=0), query(none, one)  # a quarter turn: -1 times the second, then the first of a pair
    found: dict[tuple[int, int], int] = {}
    for sign in (-1, 1):  # an entry that is always 0, as real models have them, shows in its partner alone
        distance = torch.cdist(plain.T, sign * quarter.T, compute_mode="donot_use_mm_for_euclid_dist")
        for i, j in enumerate(distance.argmin(0).tolist()):
            if i != j and distance[j, i] < 1e-2 * norm[j]:
                place = int(entry[i if norm[i] > 0 else j])
                found[(i, j) if sign < 0 else (j, i)] = place // stride if stride > 1 else place % len(offered)
    pairs = sorted((place, *pair) for pair, place in found.items())
    still = sorted(set(range(len(entry))) - {i for pair in found for i in pair})
    order = [i for _, i, _ in pairs] + still[0::2] + [j for _, _, j in pairs] + still[1::2]
    if sorted(order) != list(range(len(entry))):
        name = type(attention).__name__
        raise UserError(f"init calibrated: {name} does more to its queries than turn pairs of them by cos and sin")
    index = torch.tensor([place for place, _, _ in pairs], dtype=torch.long, device=cos.device)
    real, imaginary = plain[:, order[: len(pairs)]], plain[:, order[len(order) // 2 :][: len(pairs)]]
    heads = len(plain) // cos[:1, few].shape[1]
    by_cos, by_sin = (each[0, few][:, index * stride].repeat_interleave(heads, 0).float() for each in (cos, sin))
    wanted, seen = torch.cat([real * by_cos - imaginary * by_sin, plain[:, still]], dim=-1), query(cos, sin)
    off = (seen[:, order[: len(pairs)] + still] - wanted).norm() / seen.norm()
    if off > 2e-2:  # rounding of 16 bits is less
        raise UserError(
            f"init calibrated: what follows the RoPE in {type(attention).__name__} is not known; use init random"
        )
    frequencies = torch.cat([offered[index.to(exact)], offered.new_zeros(len(still) // 2)])
    return Rotation(torch.tensor(order, device=cos.device), frequencies, offered, scale, index * stride)


def _exact(rotary: Any, turn: Tensor, cos: Tensor) -> tuple[Tensor, float]:
    """The frequencies (pairs,) that a rotary module has for what cos and sin say roughly, and its factor on scores. Several
    kinds of layers may have their own there."""
    buffers = {name: b for name, b in rotary.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    found = {name: buffer.to(turn.device).double() for name, buffer in buffers.items()}
    name = min(found, key=lambda name: float((found[name] - turn[: len(found[name])]).abs().sum()))
    scale = getattr(rotary, name.replace("inv_freq", "attention_scaling"), None)
    return found[name], float(cos[0, 0, 0] if scale is None else scale) ** 2
