"""`pl-attnedit prepare`: tokenises and packs the text of a recipe ahead of time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ActionConfigFile, ArgumentParser

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
    config = parser.parse_args(list(arguments))
    if config.teacher is None:
        raise invalid("teacher", None, f"must be given, by --teacher or in the config; allowed: {TEACHER_SOURCES}")
    data = TextDataModule(config.teacher, **dict(parser.instantiate_classes(config).data))
    folder = Path(data.tokenizer.name_or_path)
    check_adapter("teacher", folder)
    if (folder / "config.json").is_file():  # a tokenizer alone will do here
        check_fields(config.teacher, folder)
    print(_summary(data))
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


def _summary(data: TextDataModule) -> str:
    packed, held_out = data.train_sequences, data.held_out
    lengths = sorted({data.seq_len, *(phase.seq_len for phase in data.phases)})
    documents = f"from {len(packed.documents):,} documents"
    rows: list[tuple[str, ...]] = [("source", "documents", "tokens", "bytes", "of an epoch", "passes", "folder")]
    rows += _rows(packed.corpus, *_epoch(data))
    if data.val_source is not None:
        n = len(held_out.corpus.stores)
        rows += _rows(held_out.corpus, ["held out"] * n, [""] * n)
    return "\n".join(
        [
            *aligned(rows),
            *(f"epoch: {len(data.packed(length)):,} sequences of {length} tokens, {documents}" for length in lengths),
            f"held out: {data.val_sequences} of {len(held_out):,} sequences, from {len(held_out.documents):,} documents",
            f"fingerprint: {data.fingerprint}",
        ]
    )


def _rows(corpus: Corpus, shares: list[str], passes: list[str]) -> list[tuple[str, ...]]:
    return [
        (name, f"{len(store.hashes):,}", f"{store.starts[-1]:,}", f"{store.n_bytes:,}", share, times, str(store.path))
        for name, store, share, times in zip(corpus.names, corpus.stores, shares, passes)
    ]


def _epoch(data: TextDataModule) -> tuple[list[str], list[str]]:
    """Each source's part of an epoch, and how often an epoch goes through the source."""
    packed = data.train_sequences
    if data.weights:
        part, passes = packed.per_epoch(), packed.per_epoch() / packed.sizes
    else:
        sources = packed.corpus.source[packed.documents]
        part = np.bincount(sources, weights=packed.lengths, minlength=len(packed.corpus.stores))
        passes = np.ones(len(part))
    return [f"{share:.1%}" for share in part / part.sum()], [f"{times:.2f}" for times in passes]
