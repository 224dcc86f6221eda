"""Which documents a student was trained on. It is saved with the student, so that the student is evaluated on others.

A document is identified by the 64-bit hashes of its text and of its wording (`document_hash` and `wording_hash` of
`pl_attnedit.data.sources`). The calibration text is part of the training text.
"""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pl_attnedit.errors import invalid

FILE = "trained_on.npz"  # beside a student's config.json
KEY = "trained_on"  # in a checkpoint's own part
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedOn:
    """Hashes of documents, (D,) uint64, sorted; and whether they are all: a student that started from one without this
    record may know other documents."""

    documents: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    complete: bool = True

    def __or__(self, other: TrainedOn) -> TrainedOn:
        either = [each.documents for each in (self, other) if len(each.documents)]  # millions, at every checkpoint
        documents = np.union1d(*either) if len(either) == 2 else either[0] if either else self.documents
        return TrainedOn(documents, self.complete and other.complete)

    def has(self, hashes: np.ndarray) -> np.ndarray:
        """For each of these hashes whether it is in the record, bool, of the same shape."""
        if not len(self.documents):
            return np.zeros(hashes.shape, bool)
        place = np.searchsorted(self.documents, hashes).clip(max=len(self.documents) - 1)
        return self.documents[place] == hashes

    def save(self, folder: Path) -> None:
        """Saves it next to the student's weights."""
        np.savez(folder / FILE, documents=self.documents, complete=self.complete)

    def to_checkpoint(self) -> dict[str, Any]:
        return {"documents": torch.from_numpy(self.documents.view(np.int64)), "complete": self.complete}

    @classmethod
    def of_folder(cls, folder: str | Path) -> TrainedOn:
        """The record of a saved student; without one, an incomplete record and a warning.

        Raises:
            UserError: the file is broken.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return cls._unknown(str(folder))
        try:
            with np.load(path, allow_pickle=False) as content:
                return cls(content["documents"].astype(np.uint64, casting="equiv"), bool(content["complete"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise invalid("student", str(path), f"is broken ({error}); save the student again") from error

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any], where: str = "the checkpoint") -> TrainedOn:
        """The record in a checkpoint, likewise."""
        if (found := content.get(KEY)) is None:
            return cls._unknown(where)
        return cls(found["documents"].numpy().view(np.uint64), bool(found["complete"]))

    @classmethod
    def _unknown(cls, where: str) -> TrainedOn:
        log.warning("%s does not say what it was trained on: held-out text may hold some of it", where)
        return cls(complete=False)
