"""`pl-attnedit prepare`: tokenises and packs the text of a recipe ahead of time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ActionConfigFile, ArgumentParser

from pl_attnedit.cli.options import json_option, show
from pl_attnedit.config_files import read_yaml
from pl_attnedit.data import TextDataModule
from pl_attnedit.data.packing import Corpus
from pl_attnedit.errors import invalid
from pl_attnedit.eval.report.formatting import aligned
from pl_attnedit.teachers.sources.checks import check_adapter, check_fields
from pl_attnedit.teachers.sources.resolve import TEACHER_SOURCES


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="pl-attnedit prepare",
        exit_on_error=False,
        description="Tokenise text ahead of time, before GPUs are reserved. The tokens go into the cache folder, where "
        "convert and fit with the same teacher and data find them.",
    )
    help_ = "recipe, or config of a stage: its teacher and data count; options given after it override it"
    parser.add_argument("-c", "--config", action=_DataOfConfig, help=help_)
    parser.add_argument("--teacher", type=str | None, help="whose tokenizer is used")
    parser.add_class_arguments(TextDataModule, "data", skip={"tokenizer"}, instantiate=False)
    json_option(parser)
    config = parser.parse_args(list(arguments))
    if config.teacher is None:
        raise invalid("teacher", None, f"must be given, by --teacher or in the config; allowed: {TEACHER_SOURCES}")
    data = TextDataModule(config.teacher, **dict(parser.instantiate_classes(config).data))
    folder = Path(data.tokenizer.name_or_path)
    check_adapter("teacher", folder)
    if (folder / "config.json").is_file():  # a tokenizer alone will do here
        check_fields(config.teacher, folder)
    found = _found(data)
    show(found, _table(found), as_json=config.json)
    return 0


class _DataOfConfig(ActionConfigFile):
    """Takes teacher and data out of a recipe or a LightningCLI config, and leaves the rest."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        super().__call__(parser, cfg, json.dumps(_teacher_and_data(values), default=str), option_string)


def _teacher_and_data(path: str) -> dict[str, Any]:
    content = read_yaml(path, "config", "recipe", "config of a stage")
    model: Any = content.get("model")  # of a stage
    named = (model.get("init_args") or {}) if isinstance(model, dict) else content
    data = dict(content.get("data") or {})
    stages = [content.get(stage) for stage in ("stage1", "stage2")]  # of a recipe
    if phases := [phase for stage in stages if isinstance(stage, dict) for phase in stage.get("phases") or []]:
        data["phases"] = phases
    given = {"teacher": named.get("teacher"), "data": data}
    return {name: value for name, value in given.items() if value}  # a later file may say nothing of it


def _found(data: TextDataModule) -> dict[str, Any]:
    """What was packed: sources with their part of an epoch and how often it goes through them; epochs by length."""
    packed, held_out = data.train_sequences, data.held_out
    lengths = sorted({data.seq_len, *(phase.seq_len for phase in data.phases)})
    rows = [
        {**row, "share": share, "passes": times} for row, share, times in zip(_stores(packed.corpus), *_epoch(data))
    ]
    return {
        "sources": rows,
        "held_out_sources": _stores(held_out.corpus) if data.val_source is not None else [],
        "epochs": [{"seq_len": length, "sequences": len(data.packed(length))} for length in lengths],
        "documents": len(packed.documents),
        "held_out": {
            "used": data.val_sequences,
            "sequences": len(held_out),
            "documents": len(held_out.documents),
        },
        "fingerprint": data.fingerprint,
    }


def _stores(corpus: Corpus) -> list[dict[str, Any]]:
    return [
        {
            "source": name,
            "documents": len(store.hashes),
            "tokens": int(store.starts[-1]),
            "bytes": store.n_bytes,
            "folder": str(store.path),
        }
        for name, store in zip(corpus.names, corpus.stores)
    ]


def _epoch(data: TextDataModule) -> tuple[list[float], list[float]]:
    """Each source's part of an epoch, and how often an epoch goes through the source."""
    packed = data.train_sequences
    if data.weights:
        part, passes = packed.per_epoch(), packed.per_epoch() / packed.sizes
    else:
        sources = packed.corpus.source[packed.documents]
        part = np.bincount(sources, weights=packed.lengths, minlength=len(packed.corpus.stores))
        passes = np.ones(len(part))
    return (part / part.sum()).tolist(), passes.tolist()


def _table(found: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("source", "documents", "tokens", "bytes", "of an epoch", "passes", "folder")]
    rows += [_cells(row, f"{row['share']:.1%}", f"{row['passes']:.2f}") for row in found["sources"]]
    rows += [_cells(row, "held out", "") for row in found["held_out_sources"]]
    held_out, documents = found["held_out"], f"from {found['documents']:,} documents"
    return "\n".join(
        [
            *aligned(rows),
            *(f"epoch: {e['sequences']:,} sequences of {e['seq_len']} tokens, {documents}" for e in found["epochs"]),
            f"held out: {held_out['used']} of {held_out['sequences']:,} sequences, "
            f"from {held_out['documents']:,} documents",
            f"fingerprint: {found['fingerprint']}",
        ]
    )


def _cells(row: dict[str, Any], share: str, passes: str) -> tuple[str, ...]:
    numbers = (f"{row[name]:,}" for name in ("documents", "tokens", "bytes"))
    return (row["source"], *numbers, share, passes, row["folder"])
