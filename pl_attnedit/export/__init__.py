"""Converted models in checkpoint formats of others. Adding one = a file here and a line in `FORMATS`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from pl_attnedit.errors import invalid
from pl_attnedit.export import deepseek_v3, gguf_file, granite_swa, qwen3_next, step3p5, step3p7
from pl_attnedit.export.checks import check_family
from pl_attnedit.files import writing
from pl_attnedit.modeling import load
from pl_attnedit.modeling.trained_on import FILE as TRAINED_ON

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "deepseek_v3": deepseek_v3.write,
    "gguf": gguf_file.write,
    "granite_swa": granite_swa.write,
    "qwen3_next": qwen3_next.write,
    "step3p5": step3p5.write,
    "step3p7": step3p7.write,
}


def export(student: str | Path, out: str | Path, format: str) -> Path:
    """Writes a converted model as a stock checkpoint that needs nothing of ours, with tokenizer and generation config.

    Args:
        student: folder of a converted model.
        out: folder to write; must not exist. It appears complete or not at all.
        format: a name in `FORMATS`.

    Raises:
        UserError: no converted model there, `out` exists, or something that the format cannot express, with the setting
            that would allow it.
    """
    if format not in FORMATS:
        raise invalid("format", format, f"must be one of {', '.join(FORMATS)}")
    out = Path(out)
    if out.exists():
        raise invalid("out", str(out), "exists already; give a new folder")
    model = load(student)
    check_family(model, format)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(out):
            part.mkdir(parents=True)
            FORMATS[format](model, part)
            if (Path(student) / "tokenizer_config.json").is_file():  # a model saved from Python may come without
                AutoTokenizer.from_pretrained(student).save_pretrained(part)
            if (Path(student) / TRAINED_ON).is_file():
                shutil.copy(Path(student) / TRAINED_ON, part)
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out
