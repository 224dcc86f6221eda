"""What every target is: a config dataclass and a module with Hugging Face's attention signature."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from pl_attnedit.attention.kernels.npu import fused_attention, takes_fused
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import AttentionSpec, attention_spec


@dataclass(frozen=True)
class TargetConfig:
    """Base of the targets' configs. A config validates its own fields; `check` validates them against a teacher."""

    type: ClassVar[str]  # name in the registry, in saved configs and in YAML
    default_pattern: ClassVar[str]  # pattern of `edit_model` when the user gives none

    def __post_init__(self) -> None:
        """`UserError` for a field that is not as annotated; numbers are at least 1, or 0 where that is the default."""
        kinds: dict[str, Any] = {}
        with suppress(NameError):  # annotations that mean nothing at run time are not checked
            kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            kind, value = kinds.get(field.name), getattr(self, field.name)
            if kind is bool and not isinstance(value, bool):
                raise invalid(field.name, value, "must be true or false")
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise invalid(field.name, value, f"must be one of {', '.join(get_args(kind))}")
            if kind is int or kind == int | None:
                positive(field.name, value, optional=kind is not int, least=0 if field.default == 0 else 1)

    def check(self, spec: AttentionSpec) -> None:
        """Raises `UserError` where a field does not fit the teacher's attention."""
        if spec.mixed_cache:
            raise UserError(
                f"target {self.type}: this teacher's layers cache states of another mixer beside keys and values, which "
                "the cache of a target has no place for; only gate_swa with window: null goes"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **dataclasses.asdict(self)}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> TargetConfig:
        """From a plain mapping, e.g. out of a YAML or a saved config; unknown fields are errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"target {cls.type}: unknown field {name!r}; its fields are {', '.join(known)}")
        try:
            return cls(**fields)
        except TypeError as error:  # a required field is missing
            raise UserError(f"target {cls.type}: {error}; its fields are {', '.join(known)}") from error


class Target(nn.Module, ABC):
    """A replacement for one attention module of the teacher.

    Called like a Hugging Face attention: `forward(hidden_states, position_embeddings=(cos, sin), attention_mask=...,
    past_key_values=...)` with hidden_states (batch, time, hidden) returns (output (batch, time, hidden), None).
    """

    config_class: ClassVar[type[TargetConfig]]
    functional_gradients: ClassVar[bool] = True  # whether torch.func.grad can go through `forward`
    constant_cache: ClassVar[bool] = False  # whether what it caches is of one size, however long the text
    makes_scores: ClassVar[bool] = True  # whether it attends as the teacher does, by scores of queries with keys

    def __init__(self, target: TargetConfig, model_config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self._describe(target, model_config, layer_idx)

    def _describe(self, target: TargetConfig, model_config: PreTrainedConfig, layer_idx: int) -> None:
        self.target = target
        self.spec = attention_spec(model_config, layer_idx)
        self.layer_idx = layer_idx
        target.check(self.spec)

    @classmethod
    def replacing(cls, attention: nn.Module, target: TargetConfig, config: PreTrainedConfig, layer_idx: int) -> Target:
        """The module that takes the place of a family's own `attention`, which no other model uses."""
        return cls(target, config, layer_idx)

    @abstractmethod
    def cached_bytes(self, context: int, itemsize: int) -> int:
        """Bytes cached by this layer after `context` tokens of one text, in a dtype of `itemsize` bytes."""

    def visible_per_token(self, seq_len: int) -> float:
        """Keys that a query sees, on average over a text of `seq_len` tokens."""
        return visible_on_average(seq_len, seq_len)

    def head_widths(self) -> tuple[int, int, int]:
        """Number of query heads, width of a query (and key) head, width of a value head."""
        return self.spec.num_heads, self.spec.head_dim, self.spec.value_dim

    def mixing_flops(self, seq_len: int) -> float:
        """Forward FLOPs per token beside the linear layers: scores and weighted values of what a query sees."""
        heads, query, value = self.head_widths()
        return 2 * self.visible_per_token(seq_len) * heads * (query + value)

    def kept_values(self) -> int:
        """Values per token that a forward pass leaves for the backward pass, beside the layer's input and output."""
        heads, query, value = self.head_widths()
        return heads * 2 * (query + value)


@dataclass(frozen=True)
class Init:
    """One way to set all weights of a target before training.

    Attributes:
        fill: called with the target module, the teacher's attention that it replaces, and the layer's `LayerStatistics`.
        needs_text: whether `fill` uses the statistics; if not, it may get None. needs_outputs: also those of heads' outputs.
        check: called with the target's config and the teacher's `AttentionSpec`; `UserError` where these do not allow it.
    """

    fill: Callable[[Any, nn.Module, Any], None]
    needs_text: bool = False
    needs_outputs: bool = False
    check: Callable[[Any, AttentionSpec], None] = lambda config, spec: None


def visible_on_average(reach: int, seq_len: int) -> float:
    """Keys that a query sees, on average over a text of `seq_len` tokens, where it sees the last `reach`."""
    reach = min(reach, seq_len)
    return reach - reach * (reach - 1) / (2 * seq_len)


def positive(field: str, value: Any, *, optional: bool = False, least: int = 1) -> None:
    """Checks that a config field is a whole number of at least `least` (or None if `optional`)."""
    if (value is not None or not optional) and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise invalid(field, value, f"must be a whole number of at least {least}" + (" or None" if optional else ""))


def check_as_teachers(config: TargetConfig, init: str, **own: int) -> None:
    """`UserError` unless these fields are None, or as the teacher's own."""
    for field, value in own.items():
        if getattr(config, field) not in (None, value):
            raise invalid(field, getattr(config, field), f"init {init} needs the teacher's {value}; or init 'random'")


def init_linear(linear: nn.Linear, std: float) -> None:
    """Normal weights with standard deviation `std` (the model's `initializer_range`), zero bias."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def copy_linear(target: nn.Linear, source: nn.Linear) -> None:
    """Copies weight and bias, converting the dtype."""
    target.weight.copy_(source.weight)
    if target.bias is not None:
        target.bias.copy_(source.bias)


def set_linear(linear: nn.Linear, maps: torch.Tensor) -> None:
    """Weight, and bias where there is one, from maps (outputs, inputs [+ 1])."""
    linear.weight.copy_(maps[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.copy_(maps[:, linear.in_features])


def solve(moment: torch.Tensor, cross: torch.Tensor, ridge_share: float = 1e-8) -> torch.Tensor:
    """Least squares from moments: moment^-1 @ cross, with a ridge by default far below what matters."""
    ridge = ridge_share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment + ridge, cross)


class OwnWindow(NamedTuple):
    """In place of a mask: each of `tokens` sees the last `window` ones, itself included, as in the teacher's own layer.

    blocks: the same as flex_attention's `BlockMask`, where it was made before a layer is compiled.
    """

    window: int
    tokens: int
    device: torch.device
    blocks: Any = None

    def mask(self) -> torch.Tensor:
        """(1, 1, tokens, tokens), True = visible."""
        at = torch.arange(self.tokens, device=self.device)
        return ((at <= at[:, None]) & (at > at[:, None] - self.window))[None, None]


def as_bool_mask(attention_mask: torch.Tensor | OwnWindow | None) -> torch.Tensor | None:
    """A mask of Hugging Face as (batch, 1, query, key) with True = visible; additive masks have 0 where visible.
    None: a query sees all before it."""
    if attention_mask is None:
        return None
    if isinstance(attention_mask, OwnWindow):
        return attention_mask.mask()
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:  # flash: 2 dims, flex: a BlockMask
        raise UserError(
            "attention implementation of the model: targets run on the masks of 'sdpa' or 'eager'; "
            "load the model with attn_implementation='sdpa', unless its attention gets masks of another kind with it too"
        )
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sink_logit: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped key and value heads, by the kernel that suits the device.

    query (batch, heads, queries, width), key and value (batch, kv_heads, keys, width), mask boolean and broadcastable
    to (batch, heads, queries, keys) or None = causal: query t sees the keys up to t, a single query sees all keys.
    sink_logit (heads,): an extra logit in each query's softmax that has no value, as in gpt-oss; None = none. softcap:
    scores are bounded to softcap * tanh(score / softcap), as in Gemma 2. Returns (batch, queries, heads * value width).
    """
    queries, width = query.shape[2], value.shape[-1]
    if softcap is not None:
        return capped_attention(query, key, value, mask, scale, sink_logit, softcap).transpose(1, 2).flatten(2)
    if sink_logit is not None:
        query, key, value, mask = with_sink(query, key, value, mask, sink_logit / scale)
    missing = query.shape[-1] - value.shape[-1]
    if query.device.type in ("cpu", "npu") and missing:  # their fast kernels want equal widths
        query, key = F.pad(query, (0, max(-missing, 0))), F.pad(key, (0, max(-missing, 0)))
        value = F.pad(value, (0, max(missing, 0)))
    if sink_logit is None and takes_fused(query):
        return fused_attention(query, key, value, mask, scale)[..., :width].transpose(1, 2).flatten(2)
    groups = query.shape[1] // key.shape[1]
    causal = mask is None and query.shape[2] > 1
    single = bool(query.shape[2] == 1)  # a plain one in torch.export too
    # flash attention shares keys within a group itself, and splits them over the GPU's processors
    grouped = single and groups > 1 and mask is None and query.is_cuda and query.dtype.itemsize == 2
    if single and not grouped:
        # heads of a group become query positions, so that no key is copied per head
        query = query.unflatten(1, (-1, groups)).squeeze(3)
    elif groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )[..., :width]
    output = output.flatten(1, 2).unsqueeze(2) if single and not grouped else output
    output = output[:, :, -queries:] if output.shape[2] > queries else output
    return output.transpose(1, 2).flatten(2)


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sink_logit: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """`attend` before heads are joined, with bounded scores, which no fused kernel has: all of them are in memory."""
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap)).float()
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # rows of padding see nothing, and stay finite
    if sink_logit is not None:
        sink = sink_logit.float()[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(value.dtype) @ value


def with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, product: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Adds a first key that every query sees, whose product with each query is `product` (heads,) and whose value is zero.

    One more entry in queries and keys carries the product, so masks stay boolean and equal for all heads. Without a mask a
    first query is added too, to keep the attention causal; drop its output.
    """
    width = query.shape[-1]
    more = 8  # kernels of GPUs want widths in eights
    entry = F.pad(product.to(query.dtype)[:, None, None], (0, more - 1))
    query = torch.cat([query, entry.expand(query.shape[0], -1, query.shape[2], -1)], dim=-1)
    marker = F.pad(key.new_ones(1), (width, more - 1)).expand(*key.shape[:2], 1, -1)
    key = torch.cat([marker, F.pad(key, (0, more))], dim=2)
    value = F.pad(value, (0, more, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    elif query.shape[2] > 1:
        query = F.pad(query, (0, 0, 1, 0))
    return query, key, value, mask
