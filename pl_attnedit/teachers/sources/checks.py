"""Refuses models that cannot be teachers, by their config and file headers; no weights are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers import EDITED_PREFIX
from pl_attnedit.teachers.base import WINDOW_TYPE
from pl_attnedit.teachers.multimodal import auto_class, is_multimodal, text_config, text_of, whole_class

ADAPTER_FILE = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors", "adapter_model.bin")
LOADING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # and say what does not fit
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_QUANTISATION_FIELDS = ("quantization_config", "compression_config")
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


def check_adapter(field: str, path: Path) -> None:
    """`UserError` for a folder with an adapter: Hugging Face would apply it to the weights beside it, or download others."""
    for name in _ADAPTER_FILES:
        if (path / name).is_file():
            merged = (
                "merge it into its base model and save that; if the weights beside it are merged already, take it out"
            )
            raise invalid(
                field, str(path), f"holds an adapter ({name}), which is not put on any weights here: {merged}"
            )


@contextmanager
def reading_config(field: str, name: str) -> Iterator[None]:
    """Turns any error while config.json is read into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError or a validation error, depending on what is wrong
        raise invalid(field, name, f"its config.json cannot be read: {' '.join(str(error).split())}") from error


def check_fields(name: str, path: Path) -> None:
    """`UserError` for a config.json of a converted or a quantised model."""
    fields = json.loads((path / "config.json").read_text("utf-8"))
    kind = str(fields.get("model_type", ""))
    if kind.startswith(EDITED_PREFIX) or "attention_edit" in fields:
        raise invalid(
            "teacher", name, f"is a converted model already ({kind}); must be a teacher: the model it was made from"
        )
    rope, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")  # older versions write the latter
    said = {"rope_theta": fields.get("rope_theta")} | (scaling if isinstance(scaling, dict) else {})
    for key, value in rope.items() if isinstance(rope, dict) else ():
        if said.get(key, value) not in (value, None):
            raise invalid("teacher", name, f"config.json says {key} {said[key]!r} and, in rope_parameters, {value!r}")
    for found in _quantisation(fields):
        method = found.get("quant_method") or "unknown" if isinstance(found, dict) else found
        raise invalid("teacher", name, f"its weights are quantised (method {method}); load one in 16 or 32 bits")


def _quantisation(fields: Any) -> Iterator[Any]:
    """The quantisation settings in a config, and in its parts such as text_config."""
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
    whole = is_multimodal(config)
    headless = bool(architectures) and not any(a.endswith(_ENDINGS) for a in architectures)
    if headless or not (whole or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        found = ", ".join(architectures) or kind
        raise invalid("teacher", name, f"must be a causal language model with its head, this is {found}")
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    model_class: Any = whole_class(config) if whole else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    known = model_class.__name__
    for other in {*architectures, *([own_code.rpartition(".")[2]] if isinstance(own_code, str) else [])} - {known}:
        raise invalid("teacher", name, f"its config.json says {other}, and model_type {kind}, which is run as {known}")
    dtype: Any = config.dtype
    if dtype is not None and not dtype.is_floating_point:
        raise invalid("dtype", str(dtype), f"which config.json of {name} says, must be one of floating point")
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("factor") and rope.get("rope_type", "default") == "default":
        raise invalid(
            "rope_parameters", rope, "has a factor, but no rope_type that says what for: linear, yarn, llama3"
        )
    window, types = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or [WINDOW_TYPE]
    if window is not None and window < 1 and WINDOW_TYPE in types:
        raise invalid("sliding_window", window, f"which config.json of {name} says, must be null or at least 1")
    if not config.return_dict:
        raise invalid("return_dict", False, f"which config.json of {name} says, must be true")
    try:
        with torch.device("meta"):
            model = model_class._from_config(config)
            if whole:
                text_of(model, text)
    except UserError:
        raise
    except Exception as error:  # whatever a value leads to that only the model looks at
        reason = str(error).strip().splitlines()[0]
        attention = config._attn_implementation
        if attention is not None and isinstance(error, ImportError | ValueError):  # config.json asks for one
            raise invalid(
                "attn_implementation", attention, f"which config.json of {name} asks for, cannot be used: {reason}"
            ) from error
        raise invalid("teacher", name, f"its config.json makes no model: {type(error).__name__}: {reason}") from error


def check_weights(name: str, path: Path) -> None:
    """`UserError` unless the safetensors of a folder are exactly the tensors of its model: none missing, none left over, all
    of the right shape, none quantised."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise invalid("teacher", name, "no *.safetensors there; pickled weights (*.bin) are not read")
    if (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        raise invalid("teacher", name, f"holds two sets of weights, {WEIGHTS} and {INDEX}: remove one")
    stamp = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (path / "config.json", *files))
    _check_tensors(name, path, stamp)


@lru_cache(maxsize=16)
def _check_tensors(name: str, path: Path, stamp: tuple[Any, ...]) -> None:
    """Asks Hugging Face, on the meta device, which tensors it would load after its renamings. stamp: part of the cache key,
    it changes with the files."""
    try:
        with without_reports():
            auto = auto_class(AutoConfig.from_pretrained(path))
            loaded: Any = auto.from_pretrained(path, device_map="meta", use_safetensors=True, **LOADING)
        quantised = [tensor for file in _files_of(path) for tensor in _not_plain(file)]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise invalid("teacher", name, f"cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    problem = _first({"its weights are quantised, load one in 16 or 32 bits:": quantised}) or tensor_problem(loaded[1])
    if problem:
        raise invalid("teacher", name, problem)


@contextmanager
def without_reports() -> Iterator[None]:
    """Silences Hugging Face's long warnings about tensors; the error message here is one line."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_numbers(name: str, model: Any) -> None:
    """`UserError` for a weight with nan or infinity, which training would come to know as a loss of nan."""
    for weight, values in model.named_parameters():
        if values.numel() and not all(bound.isfinite() for bound in values.detach().aminmax()):  # quick; nan stays nan
            raise invalid("teacher", name, f"its weight {weight} holds nan or infinity")


def tensor_problem(info: Mapping[str, Any]) -> str | None:
    """Which tensors do not fit the model, according to Hugging Face; None if all do."""
    mismatched = [each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]]
    return _first(
        {
            "the weights lack": info["missing_keys"],
            "its model has no place for the weights": info["unexpected_keys"],
            "its config gives another shape to the weights": mismatched,
        }
    )


def _first(problems: Mapping[str, Collection[str]]) -> str | None:
    for what, names in problems.items():
        if names:
            return f"{what} {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
    return None


def _files_of(path: Path) -> list[Path]:
    """The files that Hugging Face reads."""
    files = {WEIGHTS}
    if (path / INDEX).is_file():
        files = set(json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values())
    if left := sorted(file.name for file in path.glob("model-*-of-*.safetensors") if file.name not in files):
        raise ValueError(f"{left[0]} does not belong to the weights beside it: remove what is left of another model")
    return [path / file for file in sorted(files)]


def _not_plain(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return [f"{name} ({dtype})" for name, dtype in dtypes.items() if "weight" in name and dtype not in _PLAIN_DTYPES]
