"""The text that a student is judged on: never what it was trained on."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pl_attnedit.callbacks import check_checkpoint
from pl_attnedit.data import TextDataModule
from pl_attnedit.data.chat import render
from pl_attnedit.data.lookups import check_judged
from pl_attnedit.data.sources import BUILTIN, Document, bytes_hash, document_hash, open_source, wording_hash
from pl_attnedit.data.tokens import check_texts, load_tokenizer
from pl_attnedit.errors import invalid
from pl_attnedit.modeling.trained_on import TrainedOn
from pl_attnedit.tracking.datasets import documents_digest

MOST_CHARACTERS = 4_000_000  # about a million tokens of English
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Documents, and how many others were left out because the student was trained on them."""

    texts: list[str]
    left_out: int

    @property
    def settings(self) -> dict[str, int | str]:
        """For results.json."""
        digest = documents_digest(np.array([document_hash(text) for text in self.texts], np.uint64))
        return {"documents": len(self.texts), "documents_left_out": self.left_out, "text_digest": digest}


def trained_on(student: str | Path) -> TrainedOn:
    """What the student in a folder or a checkpoint says that it was trained on."""
    path = Path(student)
    if path.suffix == ".ckpt":
        return TrainedOn.of_checkpoint(check_checkpoint(path), str(path))
    return TrainedOn.of_folder(path)


def held_out_texts(teacher: str, text: str, trained: TrainedOn, seq_len: int = 512, *, whole: bool = True) -> HeldOut:
    """The documents that tasks are made of: of `builtin:` those that conversions hold out by default, of other text all, and
    of either those alone that the student was not trained on. Of much text `MOST_CHARACTERS`, chosen by content.
    Conversations come as the teacher's chat template renders them.

    Args:
        seq_len: of the conversion whose hold-out is taken.
        whole: of a student that does not say what it was trained on, also other text than conversions hold out.

    Raises:
        UserError: no such text; the student was trained on all of it.
    """
    check_judged("--text", text)
    data = TextDataModule(teacher, text, seq_len=seq_len)
    if text == BUILTIN or not (whole or trained.complete):
        left_out = data.leave_out(trained)
        return HeldOut(data.held_out_texts(), left_out)
    tokenizer = cache(lambda: load_tokenizer(teacher))
    found: dict[int, str] = {}
    known: set[int] = set()
    for document in open_source(text).documents():
        key = document_hash(document)
        if key in known or key in found:
            continue
        if is_trained(document, trained):
            known.add(key)
        else:
            found[key] = document if isinstance(document, str) else render(document, tokenizer(), False).text
    if known and not found:
        raise invalid("--text", text, "the student was trained on all of it; name other text")
    if known:
        log.warning(
            "%s: left out %d of %d documents, on which the student was trained",
            text,
            len(known),
            len(known) + len(found),
        )
    chosen, characters = [], 0
    for key in sorted(found):
        if characters < MOST_CHARACTERS:
            chosen.append(found[key])
            characters += len(found[key])
    check_texts(tokenizer(), chosen, f"the text of {text}")
    return HeldOut(chosen, len(known))


def is_trained(document: Document, trained: TrainedOn) -> bool:
    """Whether the student was trained on the document in whatever form (`wording_hash`; of older students' records: however
    its lines end and whatever white space is around it), or on a text that the document goes on from: the end of a text
    file is another document when the file has grown."""
    if not len(trained.documents):
        return False
    hashes = [document_hash(document), wording_hash(document)]
    if isinstance(document, str):
        plain = document.replace("\r\n", "\n").strip()
        hashes += [bytes_hash(plain.replace("\n", end).encode()) for end in ("\n", "\r\n")]
        hashes += [bytes_hash((plain.replace("\n", end) + end).encode()) for end in ("\n", "\r\n")]
        hashes += [*_beginnings(document), *(_beginnings(plain) if plain != document else [])]
    return bool(trained.has(np.array(hashes, np.uint64)).any())


def _beginnings(text: str) -> Iterator[int]:
    """The hashes of what stands before each end of a line."""
    digest, done = hashlib.blake2b(digest_size=8), 0
    for space in re.finditer(r"(?<!\s)\s*\n", text):
        digest.update(text[done : space.start()].encode())
        done = space.start()
        yield int.from_bytes(digest.digest(), "little")
