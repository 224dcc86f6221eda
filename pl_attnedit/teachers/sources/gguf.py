"""Converts a GGUF file to a Hugging Face folder. Every setting of the file is applied, or refused by name.

transformers reads the tensors and most keys of a file and silently ignores the others. llama.cpp defines what a key means:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and its `llama-model.cpp`.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers.sources.checks import LOADING, check_model, tensor_problem, without_reports
from pl_attnedit.teachers.sources.gguf_tokenizer import ends_of, exact_tokenizer

CONVERTER = 5  # version of the conversion, part of the cache key
FREQUENCIES = "rope_freqs.weight"  # by what RoPE's frequencies are divided: Llama 3.1's scaling
_THETA = 10000.0  # where a file does not say rope.freq_base

# keys of an architecture: the field of Hugging Face's config that has this value
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.dimension_count": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}
_REQUIRED = (
    *("context_length", "embedding_length", "block_count"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
_OF_ROPE = {
    "rope.freq_base",
    "rope.scale_linear",
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length")),
    *(f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values at which a key changes nothing
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax, Qwen's
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_DESCRIPTIVE = {"tensor_data_layout", "rope.scaling.finetuned"}


def made_by() -> str:
    """The versions that the result of `convert` depends on."""
    return f"{CONVERTER} transformers {transformers.__version__} gguf {metadata.version('gguf')}"


def convert(file: Path, target: Path) -> None:
    """Writes the model of a GGUF, in float32, and its tokenizer into the folder `target`.

    Raises:
        UserError: no causal language model, or a setting that cannot be applied.
    """
    try:
        reader = gguf.GGUFReader(file)
        _check_file(reader)
        config = _exact_config(file, reader)
        with without_reports():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32, **LOADING
            )
        model, found = loaded
        _check_tensors(reader, model, found)
        tokenizer = exact_tokenizer(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), reader)
    except UserError as error:
        raise UserError(f"teacher = {str(file)!r}: {error}") from error
    except Exception as error:  # broken or unknown files raise errors of many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise invalid("teacher", str(file), f"cannot be read as a GGUF causal language model: {reason}") from error
    check_model(str(file), model.config)
    # The weights are plain float32 now; what is left of the quantisation would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if (theta := (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")) is not None:
        model.config.rope_theta = theta  # older readers ignore rope_parameters and silently take 10000
    model.generation_config.eos_token_id = ends_of(reader)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The keys of the file's architecture, without its name."""
    prefix = reader.fields["general.architecture"].contents() + "."
    return {
        key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
    }


def _check_file(reader: gguf.GGUFReader) -> None:
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise UserError("is big-endian; must be a little-endian GGUF")
    kind = reader.fields.get("general.type")
    if kind is not None and kind.contents() != "model":
        raise UserError(f"holds no model (general.type = {kind.contents()!r})")
    parts = reader.fields.get("split.count")
    if parts is not None and (total := parts.contents()) > 1:
        raise UserError(f"is one of {total} files; their names must be NAME-00001-of-{total:05}.gguf and so on")


def _exact_config(file: Path, reader: gguf.GGUFReader) -> PreTrainedConfig:
    """transformers' config of the file, corrected by the keys that transformers ignores."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    fields, names = _fields(reader), {tensor.name for tensor in reader.tensors}
    given = config.to_dict()
    if lacking := [key for key in _REQUIRED if key not in fields and _FIELDS[key] in given]:
        raise UserError(f"does not say {lacking[0]}, for which nothing but the class has a value")
    changes: dict[str, Any] = {}
    for key in ("attention.key_length", "expert_feed_forward_length"):
        if key in fields and _FIELDS[key] in given:
            changes[_FIELDS[key]] = fields[key]
    for field, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if field in given:
            changes[field] = tensor in names
    if "sliding_window" in given and "attention.sliding_window" not in fields:
        changes["sliding_window"] = None  # a window that only the class has, not the file
    rope = _rope(given | changes, fields, reader)
    if rope is not None:
        changes["rope_parameters"] = rope
    config = type(config).from_dict(given | changes)
    for key, value in fields.items():
        honoured = key in _OF_ROPE or (key in _FIELDS and getattr(config, _FIELDS[key], None) == value)
        if not honoured and key not in _DESCRIPTIVE and value not in _NEUTRAL.get(key, ()):
            raise UserError(f"says {key} = {str(value)[:60]}, which is not honoured for {config.model_type} models")
    if rope is not None and any(config.rope_parameters.get(name) != value for name, value in rope.items()):
        raise UserError(f"has the RoPE {rope}, this transformers reads {config.rope_parameters}")
    return config


def _rope(given: dict[str, Any], fields: dict[str, Any], reader: gguf.GGUFReader) -> dict[str, Any] | None:
    """Hugging Face's RoPE parameters; None where the class has several, which must be what the file says already."""
    known = given.get("rope_parameters") or {}
    theta = fields.get("rope.freq_base", _THETA)
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    kind = fields.get("rope.scaling.type", "linear") if factor != 1.0 else "none"
    by_tensor = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if "rope_theta" not in known:
        thetas = {each.get("rope_theta") for each in known.values() if isinstance(each, dict)}
        if kind != "none" or by_tensor is not None or ("rope.freq_base" in fields and theta not in thetas):
            raise UserError(f"scales RoPE ({kind}), which is not honoured for {given['model_type']} models")
        return None
    rope = {"rope_type": "default", "rope_theta": theta}
    if by_tensor is not None:
        if kind != "none":
            raise UserError(f"has both {FREQUENCIES} and rope.scaling.type = {kind}, which are not honoured together")
        return _by_frequencies(given, rope, torch.from_numpy(by_tensor.data.copy()).float())
    if kind == "none":
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(f"says rope.scaling.type = {kind!r}; honoured are none, linear and yarn")
    original = fields.get("rope.scaling.original_context_length") or given["max_position_embeddings"]
    rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    betas = {name: fields.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return rope | {name: value for name, value in betas.items() if value is not None}


def _by_frequencies(given: dict[str, Any], plain: dict[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a GGUF has only the result; factors: (head_dim / 2,) float32."""
    if bool((factors == 1).all()):
        return plain
    heads = given["hidden_size"] // given["num_attention_heads"]
    dim = given.get("head_dim") or heads
    unscaled = plain["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    for exponent in range(4, given["max_position_embeddings"].bit_length()):
        found = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        found |= plain | {"rope_type": "llama3", "original_max_position_embeddings": 2**exponent}
        config = AutoConfig.for_model(**given | {"rope_parameters": found})
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        if scaled.shape == factors.shape and torch.allclose(scaled * factors, unscaled, rtol=1e-5):
            return found
    raise UserError(f"has other factors in {FREQUENCIES} than Llama 3.1's scaling gives, which are not honoured")


def _check_tensors(reader: gguf.GGUFReader, model: Any, found: dict[str, Any]) -> None:
    """Every tensor of the file is in the model, and all of the model came from the file."""
    if problem := tensor_problem(found):
        raise UserError(problem)
    wanted = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(wanted.values()) == sum(int(t.n_elements) for t in reader.tensors if t.name != FREQUENCIES):
        return
    architecture = reader.fields["general.architecture"].contents()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    read = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()} | {FREQUENCIES}
    unread = [tensor.name for tensor in reader.tensors if tensor.name not in read and "_exps." not in tensor.name]
    raise UserError(f"has tensors that are not in a {model.config.model_type} model: {', '.join(unread[:3])} ...")
