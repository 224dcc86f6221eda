"""What a teacher's attention looks like, read off its own modules."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.registration import EDITED_PREFIX

OUTPUTS = ("o_proj", "out_proj", "dense")  # what families call the projection of the attention's output
TEXT_MODEL = "_text"  # how the type of a text model in a multimodal one ends
FULL_TYPE, WINDOW_TYPE = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class AttentionSpec:
    """Shape of one attention module of a teacher. Widths are in features, `head_dim` and `value_dim` per head.

    `scaling` is the factor on the scores before the softmax; `window` the tokens that the teacher's own queries see, None =
    all earlier ones; `softcap` bounds the scores; `own_sinks` are learned ones. The model's cos and sin hold `rope_pairs`
    frequencies, of which each is found every `rope_stride` entries; 0 = it has none. `plain_heads`: the projections make
    queries, keys and values of one width, and nothing else, such as a gate or a latent. `cached_values_per_token` are values
    (not bytes) that the teacher caches per token and layer; `mixed_cache`: with them, states of another mixer in the layer.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    output_width: int
    qkv_bias: bool
    o_bias: bool
    rms_norm_eps: float
    initializer_range: float
    scaling: float
    window: int | None = None
    softcap: float | None = None
    own_sinks: bool = False
    rope_pairs: int = 0
    rope_stride: int = 1
    plain_heads: bool = True
    cached_values_per_token: int = 0
    mixed_cache: bool = False

    @property
    def value_dim(self) -> int:
        return self.output_width // self.num_heads


def output_projection(attention: Any) -> nn.Linear:
    """The linear module behind an attention's heads."""
    for name in OUTPUTS:
        if isinstance(found := getattr(attention, name, None), nn.Linear):
            return found
    raise UserError(f"teacher: {type(attention).__name__} has no output projection ({', '.join(OUTPUTS)})")


def attention_of(layer: Any) -> Any:
    """The attention of a decoder layer; None in a hybrid's layer without one."""
    return getattr(layer, "self_attn", None)


def _spec_of(model: Any, index: int, window: int | None) -> AttentionSpec:
    """Of a layer of a decoder on the meta device."""
    attention, config = attention_of(model.layers[index]), model.config
    (pairs, stride), (cached, mixed) = _rope_of(model, index), _cached_by(model, index)
    heads = config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads, output = getattr(config, "num_key_value_heads", None) or heads, output_projection(attention)
    inputs = [m for m in attention.modules() if isinstance(m, nn.Linear) and m is not output]
    scaling = getattr(attention, "scaling", None)
    return AttentionSpec(
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        output_width=output.in_features,
        qkv_bias=any(m.bias is not None for m in inputs),
        o_bias=output.bias is not None,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        initializer_range=getattr(config, "initializer_range", 0.02),
        scaling=scaling if isinstance(scaling, float) else head_dim**-0.5,
        window=window,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        own_sinks=isinstance(getattr(attention, "sinks", None), torch.Tensor),
        rope_pairs=pairs,
        rope_stride=stride,
        plain_heads=sum(m.out_features for m in inputs) == (heads + 2 * kv_heads) * head_dim,
        cached_values_per_token=cached or 2 * kv_heads * head_dim,
        mixed_cache=mixed,
    )


def goes_through_interface(attention: nn.Module | None) -> bool:
    """Whether an attention module has its scores made by the function that its config names."""
    if attention is None:
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def rotary_of(model: Any) -> Any:
    """A decoder's module that makes cos and sin for its layers; None where it has none."""
    return getattr(model, "rotary_emb", None) or getattr(model, "pos_emb", None)


def cos_and_sin(rotary: Any, config: Any, hidden: torch.Tensor, positions: torch.Tensor, layer: int = -1) -> Any:
    """What a decoder's rotary module makes for these positions (batch, time), of this layer's kind if each has its own; None
    where that kind has no RoPE."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return rotary(hidden, positions)
    kind = config.layer_types[layer]
    return None if config.rope_parameters.get(kind, kind) is None else rotary(hidden, positions, layer_type=kind)


def _rope_of(model: Any, index: int) -> tuple[int, int]:
    """Frequencies in a decoder layer's cos and sin, and every how many entries the next one comes."""
    try:
        with torch.device("cpu"):
            rotary = type(rotary_of(model))(config=model.config)
            position = torch.ones(1, 1, dtype=torch.long)
            cos, sin = cos_and_sin(rotary, model.config, torch.zeros(1, 1, 1), position, index)
    except (AttributeError, TypeError, ValueError):  # none, or not of this form
        return 0, 1
    turn = torch.atan2(sin, cos).flatten()
    if torch.equal(turn[0::2], turn[1::2]):
        return len(turn) // 2, 2
    halves = torch.equal(*turn.chunk(2))
    return len(turn) // 2 if halves else len(turn), 1


def call_of(model: Any, hidden: torch.Tensor, past: int = 0, layer: int = -1) -> dict[str, Any]:
    """What a layer of a decoder, or its attention, is called with beside hidden states (batch, time, hidden) behind `past`
    others; of this layer's kind, if each has its own."""
    positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
    call = {"position_ids": positions, "attention_mask": None}
    if (rotary := rotary_of(model)) is not None:
        call["position_embeddings"] = cos_and_sin(rotary, model.config, hidden, positions, layer)
    return call


def _cached_by(model: Any, index: int) -> tuple[int, bool]:
    """Values that a layer of a decoder on the meta device caches for a token, 0 where it could not be tried; and whether
    its cache holds other states too."""
    cache = DynamicCache(config=model.config)
    layer = cache.layers[index]
    with suppress(Exception):  # what follows the cache, or a family that is refused elsewhere
        hidden = torch.zeros(1, 1, model.config.hidden_size, device="meta")
        call = {"position_embeddings": None, **call_of(model, hidden, layer=index)}
        attention_of(model.layers[index])(hidden_states=hidden, past_key_values=cache, **call)
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    values = sum(each.numel() for each in held if each is not None)
    return values, hasattr(layer, "conv_states")


def windows_of(config: Any) -> list[int | None]:
    """The window of each layer of a teacher with this config, None where it sees all earlier tokens or has no attention."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [WINDOW_TYPE if window else FULL_TYPE] * layers
    return [window if kind == WINDOW_TYPE else None for kind in types]


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The teacher's config of a converted model's, or the config itself."""
    if not config.model_type.startswith(EDITED_PREFIX):
        return config
    return AutoConfig.for_model(config.model_type.removeprefix(EDITED_PREFIX), **fields_of(config))


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's fields that a converted model has from its teacher: all but those that say what kind of model it is."""
    kind = ("attention_edit", "model_type", "architectures", "transformers_version", "auto_map")
    return {name: value for name, value in config.to_dict().items() if name not in kind}


def layer_specs(config: PreTrainedConfig) -> tuple[AttentionSpec | None, ...]:
    """The attention of each layer in a teacher or converted model with this config, None where a layer has none."""
    plain = plain_config(config)
    return _layer_specs(json.dumps({**plain.to_dict(), "model_type": plain.model_type}, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _layer_specs(fields: str) -> tuple[AttentionSpec | None, ...]:
    config = AutoConfig.for_model(**json.loads(fields))
    with torch.device("meta"):
        model: Any = model_class(config)._from_config(config).model
    if len(model.layers) != config.num_hidden_layers:
        raise AttributeError(f"it has {len(model.layers)} layers where the config says {config.num_hidden_layers}")
    _check_cache(model)
    layers = zip(model.layers, windows_of(config), strict=True)
    return tuple(
        _spec_of(model, index, window) if goes_through_interface(attention_of(layer)) else None
        for index, (layer, window) in enumerate(layers)
    )


def attention_spec(config: PreTrainedConfig, layer_idx: int | None = None) -> AttentionSpec:
    """The shape of the attention in a layer of a teacher or converted model; of the first full layer where none is given."""
    specs = layer_specs(config)
    if layer_idx is not None:
        found = specs[layer_idx]
    else:
        there = [spec for spec in specs if spec is not None]
        found = next((spec for spec in there if spec.window is None), there[0] if there else None)
    if found is None:
        raise invalid("layers", layer_idx, f"layer {layer_idx} of this teacher ({config.model_type}) has no attention")
    return found


def editable_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that a pattern's letters are for: those that see all earlier tokens, or all with attention if none does."""
    there = {index: spec for index, spec in enumerate(layer_specs(config)) if spec is not None}
    return [index for index, spec in there.items() if spec.window is None] or list(there)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Hugging Face's class of causal language models for a teacher's config; `UserError` where it has none."""
    model_type = config.model_type.removeprefix(EDITED_PREFIX)
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401  # has no `get`
    found: Any = AutoModelForCausalLM._model_mapping.get(config_class, None) if config_class else None
    if found is None and model_type.endswith(TEXT_MODEL):
        found = _with_head(config_class)
    if found is None or not getattr(found, "__name__", "").endswith("ForCausalLM"):
        what = "transformers has no decoder for it (a class named ...ForCausalLM) whose attention could be replaced"
        raise invalid("teacher model type", config.model_type, what)
    return found


def _with_head(config_class: Any) -> type[PreTrainedModel] | None:
    """A causal language model around a decoder that transformers has in multimodal models alone; None without one."""
    try:
        decoder: Any = MODEL_MAPPING[config_class]
    except (KeyError, ValueError):  # not there, or named there and nowhere else
        return None
    family = decoder.__bases__[0]

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        family.__init__(self, config)
        self.model = decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    content = {
        **{
            "__module__": __name__,
            "__init__": __init__,
            "forward": LlamaForCausalLM.forward,
            "config_class": config_class,
        },
        "_tied_weights_keys": LlamaForCausalLM._tied_weights_keys,
        "_can_set_experts_implementation": family._can_set_experts_implementation,
    }
    made: Any = type(f"{decoder.__name__.removesuffix('Model')}ForCausalLM", (family, GenerationMixin), content)
    AutoModelForCausalLM.register(config_class, made, exist_ok=True)  # of a config of its own transformers wants that
    return made


def _check_cache(model: Any) -> None:
    given = inspect.signature(model.forward).parameters.get("past_key_values")
    for name in set(re.findall(r"\w*Cache", str(given))) - {"Cache", "DynamicCache"}:
        raise UserError(
            f"teacher: {type(model).__name__} has a cache of its own ({name}); targets know transformers' DynamicCache"
        )
