"""The text of a run as MLflow's dataset inputs: where it is from, which documents, and what they are used for."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import MAX_DATASET_NAME_SIZE

if TYPE_CHECKING:  # tracking alone does not wait for the import of tokenizers and datasets
    from pl_attnedit.data import TextDataModule
    from pl_attnedit.data.packing import PackedSequences

Context = Literal["training", "validation", "evaluation"]
UsedText = dict[str, str]
"""One dataset and its use, as the journal keeps it: ``name, digest, source_type, source, profile, context``."""


def documents_digest(hashes: np.ndarray) -> str:
    """Of documents by their hashes (`document_hash`), uint64, in any order: 8 hex digits, as MLflow's own digests."""
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()[:8]


def used_text(name: str, context: Context, digest: str, **profile: int) -> UsedText:
    """Documents of one source.

    Args:
        name: of the source, as `TextDataModule` takes it.
        context: what they are used for.
        digest: see `documents_digest`.
        profile: numbers for readers, such as that of the documents.
    """
    kind, source = _origin(name)
    return {
        "name": name[:MAX_DATASET_NAME_SIZE],
        "digest": digest,
        "source_type": kind,
        "source": json.dumps(source),
        "profile": json.dumps(profile),
        "context": context,
    }


def _origin(name: str) -> tuple[str, dict[str, str]]:
    """Type and content of a dataset's source, in MLflow's words. `name` was found: what is no file is on the hub."""
    local = name.endswith(":") or glob.has_magic(name) or Path(name).expanduser().exists()
    return ("local", {"uri": name}) if local else ("hugging_face", {"path": name})


def training_text(data: TextDataModule) -> list[UsedText]:
    """What a training reads: each source's training split and its held-out documents."""
    return [*_of_each_source(data.train_sequences, "training"), *_of_each_source(data.held_out, "validation")]


def evaluation_text(data: TextDataModule) -> list[UsedText]:
    """The held-out documents, as those of an evaluation."""
    return list(_of_each_source(data.held_out, "evaluation"))


def _of_each_source(packed: PackedSequences, context: Context) -> Iterator[UsedText]:
    corpus, documents = packed.corpus, packed.documents
    for index, name in enumerate(corpus.names):
        own = documents[corpus.source[documents] == index]
        if len(own):
            sizes = {"documents": len(own), "tokens": int(corpus.lengths[own].sum())}
            yield used_text(name, context, documents_digest(corpus.hashes[own]), **sizes)


def dataset_input(text: UsedText) -> DatasetInput:
    """As MLflow takes it."""
    fields = {key: value for key, value in text.items() if key != "context"}
    return DatasetInput(Dataset(**fields), [InputTag(MLFLOW_DATASET_CONTEXT, text["context"])])
