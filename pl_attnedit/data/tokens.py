"""Documents as tokens, kept in the cache folder and read through memory maps: a second start is instant."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pl_attnedit.data.chat import check_chat, mark_answers, render
from pl_attnedit.data.sources import Document, OpenSource, document_hash
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers.source import (
    PACKAGE_PREFIX,
    TEACHER_SOURCES,
    TOKENIZER_FILES,
    build_once,
    cache_root,
    hub_snapshot,
    resolve_teacher,
)

# Part of the cache key: raise it when documents would be tokenised differently.
VERSION = 1
BATCH = 256  # documents handed to the tokenizer at once; it spreads them over the cores

LossOn = Literal["all", "answers"]


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents on disk, without exact duplicates, each ending with EOS.

    Legend: N tokens in all, D documents. The arrays are memory maps.
    """

    path: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids of all documents one after the other, shape (N,), int32."""
        return np.memmap(self.path / "tokens.bin", dtype=np.int32, mode="r")

    @cached_property
    def answers(self) -> np.ndarray | None:
        """Is this token (part of) an answer? Shape (N,), bool; None where the loss is on all tokens."""
        file = self.path / "answers.bin"
        return np.memmap(file, dtype=bool, mode="r") if file.exists() else None

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document starts in `tokens`, and N at the end, shape (D + 1,), int64."""
        return np.load(self.path / "starts.npy", mmap_mode="r")

    @cached_property
    def hashes(self) -> np.ndarray:
        """Hash of each document's content, shape (D,), uint64."""
        return np.load(self.path / "hashes.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)  # worker processes open the files themselves


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one of a teacher: folder, hub name, `.gguf` file or `package:<name>`.

    Raises:
        UserError: none found there, or one without an end-of-sequence token to join documents with.
    """
    if isinstance(tokenizer, str):
        if tokenizer.startswith(PACKAGE_PREFIX) or tokenizer.endswith(".gguf"):
            folder = resolve_teacher(tokenizer)
        elif Path(tokenizer).is_dir():
            folder = Path(tokenizer)
        else:
            folder = hub_snapshot("tokenizer", tokenizer, TOKENIZER_FILES, TEACHER_SOURCES)
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # which one depends on what is missing or broken
            reason = str(error).strip().splitlines()[0]
            raise invalid("tokenizer", tokenizer, f"no tokenizer can be loaded from there: {reason}") from error
    else:
        loaded = tokenizer
    if loaded.eos_token_id is None:
        raise invalid("tokenizer", loaded.name_or_path, "must have an end-of-sequence token: it joins the documents")
    return loaded


def model_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest sequence of the tokenizer's model in tokens: what the tokenizer says and the config beside it.

    An enormous number where neither says anything.
    """
    longest = int(tokenizer.model_max_length)
    config = Path(tokenizer.name_or_path) / "config.json"
    if config.is_file():
        longest = min(longest, json.loads(config.read_text("utf-8")).get("max_position_embeddings") or longest)
    return longest


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of all that decides how text becomes tokens."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(truncation=None, padding=None)  # left behind by the last call, of no effect on the next
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    described = [rules, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def tokenize(sources: Sequence[OpenSource], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> TokenStore:
    """The tokens of all documents of the sources, from the cache where they have been made before.

    Plain text is encoded as the tokenizer does by itself (with a BOS token where it has one); EOS is appended where the
    text does not end with it. With ``loss_on="answers"`` the tokens of the answers in conversations are marked, and all
    tokens of plain text.

    Raises:
        UserError: a source that cannot be read, no document in any of them, no conversation for ``answers``.
    """
    described = [VERSION, [source.identity for source in sources], tokenizer_digest(tokenizer), loss_on]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
    # Worker processes are forked later; without this the tokenizer's threads make each of them print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    documents = itertools.chain.from_iterable(source.documents() for source in sources)
    folder = cache_root() / "tokens" / key
    return TokenStore(build_once(folder, lambda part: _write(part, documents, tokenizer, loss_on)))


def _write(folder: Path, documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    starts, seen = [0], dict[int, None]()  # the dict keeps the order of the documents
    conversations = False
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "answers.bin").open("wb") as answers:
        new = _without_duplicates(
            tqdm(documents, "tokenising", unit=" documents", delay=2, leave=False, disable=None), seen
        )
        while batch := list(itertools.islice(new, BATCH)):
            conversations |= any(not isinstance(document, str) for document in batch)
            for ids, marked in _encode(batch, tokenizer, loss_on):
                _append(tokens, np.asarray(ids, dtype=np.int32))
                _append(answers, marked)
                starts.append(starts[-1] + len(ids))
    if not seen:
        raise UserError("source: holds no documents with text")
    if loss_on == "all":
        (folder / "answers.bin").unlink()
    elif not conversations:
        raise invalid("loss_on", loss_on, "needs chat data (a column with messages), the source has plain text only")
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(folder / "hashes.npy", np.fromiter(seen, dtype=np.uint64, count=len(seen)))


def _without_duplicates(documents: Iterator[Document], seen: dict[int, None]) -> Iterator[Document]:
    for document in documents:
        if (key := document_hash(document)) not in seen:
            seen[key] = None
            yield document


def _encode(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids of each document with EOS at the end, and which of them are answers."""
    want_answers = loss_on == "answers"
    for chat, group in itertools.groupby(documents, key=lambda document: not isinstance(document, str)):
        if chat:
            check_chat(tokenizer, want_answers)
            rendered = [render(document, tokenizer, want_answers) for document in group]  # type: ignore[arg-type]
            texts, answers = [r.text for r in rendered], [r.answers for r in rendered]
        else:
            texts = list(group)  # type: ignore[arg-type]
        encoded = tokenizer(
            texts, add_special_tokens=not chat, return_offsets_mapping=chat and want_answers, verbose=False
        )
        for i, ids in enumerate(encoded["input_ids"]):
            supervised = not (chat and want_answers)
            marked = np.ones(len(ids), bool) if supervised else mark_answers(encoded["offset_mapping"][i], answers[i])
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids, marked = [*ids, tokenizer.eos_token_id], np.append(marked, supervised)
            yield ids, marked


def _append(file: BinaryIO, array: np.ndarray) -> None:
    file.write(array.tobytes())
