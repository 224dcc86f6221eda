"""What is no teacher, found from its config and the heads of its files: not one weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from pl_attnedit.errors import invalid
from pl_attnedit.teachers import EDITED_PREFIX

ADAPTER_FILE = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_QUANTISATION_FIELDS = ("quantization_config", "compression_config")
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


def check_adapter(field: str, path: Path) -> None:
    """Hugging Face would put an adapter on top of the weights beside it, or fetch others to put it on."""
    if (path / ADAPTER_FILE).is_file():
        raise invalid(
            field,
            str(path),
            f"holds an adapter ({ADAPTER_FILE}), which is not put on any weights here: merge it into its base model and "
            "save that, or take it out of the folder where its weights are merged already",
        )


def check_fields(name: str, path: Path) -> None:
    """`UserError` for a config.json of a converted or a quantised model."""
    fields = json.loads((path / "config.json").read_text("utf-8"))
    kind = str(fields.get("model_type", ""))
    if kind.startswith(EDITED_PREFIX):
        raise invalid(
            "teacher", name, f"is a converted model already ({kind}); must be a teacher: the model it was made from"
        )
    for found in _quantisation(fields):
        method = found.get("quant_method") or "unknown" if isinstance(found, dict) else found
        raise invalid("teacher", name, f"its weights are quantised (method {method}); load one in 16 or 32 bits")


def _quantisation(fields: Any) -> Iterator[Any]:
    """What a config says about it, also that of a part, such as text_config."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in _QUANTISATION_FIELDS and value:
            yield value
        yield from _quantisation(value)


def check_model(name: str, config: PreTrainedConfig) -> None:
    """`UserError` for what is no causal language model, or one whose attention cannot run here."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise invalid("teacher", name, f"must be a causal language model, {kind} is an encoder-decoder")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise invalid("teacher", name, f"must be a causal language model, {kind} is an encoder-only model")
    architectures = config.architectures or []
    headless = bool(architectures) and not any(a.endswith(_CAUSAL_ENDINGS) for a in architectures)
    if headless or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = ", ".join(architectures) or kind
        raise invalid("teacher", name, f"must be a causal language model with its head, this is {found}")
    attention = config._attn_implementation
    if attention is not None:  # config.json asks for one
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config)
        except (ImportError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise invalid(
                "attn_implementation", attention, f"which config.json of {name} asks for, cannot be used: {reason}"
            ) from error


def check_weights(name: str, path: Path) -> None:
    """`UserError` unless the safetensors of a folder are exactly the tensors of its model: none missing, none unread, all of
    the right shape, and none quantised."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise invalid("teacher", name, "no *.safetensors there; pickled weights (*.bin) are not read")
    if (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        raise invalid("teacher", name, f"holds two sets of weights, {WEIGHTS} and {INDEX}: remove one")
    stamp = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (path / "config.json", *files))
    _check_tensors(name, path, stamp)


@lru_cache(maxsize=16)
def _check_tensors(name: str, path: Path, stamp: tuple[Any, ...]) -> None:
    """Hugging Face itself says which tensors it would load, with all renamings of its own; on the meta device it loads
    none. stamp: what the answer stands for."""
    noise, before = logging.ERROR + 1, logging.get_verbosity()
    logging.set_verbosity(noise)  # a report of many lines, which says the same
    try:
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, device_map="meta", use_safetensors=True, **options)
        quantised = [tensor for file in _files_of(path) for tensor in _not_plain(file)]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise invalid("teacher", name, f"cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(before)
    found = loaded[1]
    mismatched = [each if isinstance(each, str) else each[0] for each in found["mismatched_keys"]]
    for wrong, what in (
        (quantised, "its weights are quantised, load one in 16 or 32 bits:"),
        (found["missing_keys"], "the weights lack"),
        (found["unexpected_keys"], "its model has no place for the weights"),
        (mismatched, "config.json gives another shape to the weights"),
    ):
        if wrong:
            more = ", ..." if len(wrong) > 3 else ""
            raise invalid("teacher", name, f"{what} {', '.join(sorted(wrong)[:3])}{more}")


def _files_of(path: Path) -> list[Path]:
    """The files that Hugging Face reads."""
    if not (path / INDEX).is_file():
        return [path / WEIGHTS]
    shards = set(json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values())
    if left := sorted(file.name for file in path.glob("model-*.safetensors") if file.name not in shards):
        raise ValueError(f"{INDEX} does not name {left[0]}, which lies beside it: remove what is left of another model")
    return [path / shard for shard in sorted(shards)]


def _not_plain(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return [f"{name} ({dtype})" for name, dtype in dtypes.items() if "weight" in name and dtype not in _PLAIN_DTYPES]
