"""Documents as tokens, kept in the cache folder and read through memory maps: a second start is instant."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pl_attnedit.cache import build_once, cache_root
from pl_attnedit.data.chat import check_chat, mark_answers, render
from pl_attnedit.data.encoding import TooLongError, bare, encode
from pl_attnedit.data.sources import Document, OpenSource, bytes_hash, document_hash, wording_hash
from pl_attnedit.errors import invalid
from pl_attnedit.shapes import SHAPE_PREFIX
from pl_attnedit.teachers.sources.resolve import (
    PACKAGE_PREFIX,
    TEACHER_SOURCES,
    TOKENIZER_FILES,
    hub_snapshot,
    resolve_teacher,
)

# Part of the cache key: raise it when documents would be tokenised differently.
VERSION = 6
# Documents are handed to the tokenizer, which spreads them over the cores, until they have this many characters: bounded
# memory for books, enough work for many cores. Its Encodings take some 100 bytes per token.
BATCH_CHARACTERS = 4_000_000

LossOn = Literal["all", "answers"]
DocumentT = TypeVar("DocumentT", bound=Document)

# A forked process has no tokenizer threads and would wait for them forever.
os.register_at_fork(after_in_child=partial(os.environ.__setitem__, "TOKENIZERS_PARALLELISM", "false"))


@dataclass(frozen=True)
class TokenStore:
    """The tokenised documents of one source on disk, each ending with EOS; duplicates are still in.

    Legend: N tokens in all, D documents. The arrays are memory maps.
    """

    path: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids of all documents one after the other, shape (N,), uint16 where the vocabulary fits, else int32."""
        [file] = self.path.glob("tokens.*")
        return _memory_map(file, file.suffix[1:])

    @cached_property
    def answers(self) -> np.ndarray | None:
        """Is this token (part of) an answer? Shape (N,), bool; None where the loss is on all tokens."""
        file = self.path / "answers.bool"
        return _memory_map(file, "bool") if file.exists() else None

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document starts in `tokens`, and N at the end, shape (D + 1,), int64."""
        return np.load(self.path / "starts.npy", mmap_mode="r")

    @cached_property
    def hashes(self) -> np.ndarray:
        """Hash of each document's content, shape (D,), uint64."""
        return np.load(self.path / "hashes.npy", mmap_mode="r")

    @cached_property
    def wordings(self) -> np.ndarray:
        """Hash of what each document says (`wording_hash`), shape (D,), uint64."""
        return np.load(self.path / "wordings.npy", mmap_mode="r")

    @cached_property
    def token_hashes(self) -> np.ndarray:
        """Hash of each document's tokens and of which are answers, shape (D,), uint64."""
        return np.load(self.path / "token_hashes.npy", mmap_mode="r")

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)  # pickled as a path; worker processes open the files themselves


def _memory_map(file: Path, dtype: str) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, mode="r"))  # slicing a plain array is several times faster


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one of a teacher: folder, hub name, `.gguf` file, `package:` or `shape:<name>`.

    Raises:
        UserError: none found there, or one without an end-of-sequence token to join documents with.
    """
    if isinstance(tokenizer, str):
        if tokenizer.startswith((PACKAGE_PREFIX, SHAPE_PREFIX)) or tokenizer.endswith(".gguf"):
            folder = resolve_teacher(tokenizer)
        elif Path(tokenizer).expanduser().is_dir():
            folder = Path(tokenizer).expanduser()
        else:
            folder = hub_snapshot("tokenizer", tokenizer, TOKENIZER_FILES, TEACHER_SOURCES)
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # the type depends on what is missing or broken
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
    return min(longest, _model_fields(tokenizer).get("max_position_embeddings") or longest)


def _model_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config beside a tokenizer, of a multimodal model its text model's; empty where there is none."""
    config = Path(tokenizer.name_or_path) / "config.json"
    fields = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    return {**fields, **(fields.get("text_config") or {})}


def unknown_to_model(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of its model's embeddings, if the tokenizer has tokens beyond them; else None."""
    known = _model_fields(tokenizer).get("vocab_size")
    return known if known is not None and max(tokenizer.get_vocab().values()) >= known else None


def check_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], where: str) -> None:
    """`UserError` for texts with tokens that the tokenizer's model has no embeddings for."""
    if (known := unknown_to_model(tokenizer)) is not None:
        check_vocabulary(tokenizer, max(map(max, filter(None, encode(tokenizer, texts))), default=0), known, where)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, highest: int, known: int, where: str) -> None:
    """A tokenizer may have tokens that its model has no embeddings for, as long as nothing uses them.

    Raises:
        UserError: the highest token id that is used is not below `known`, the number of embeddings.
    """
    if highest >= known:
        token = f"{where} has token {highest}, {tokenizer.convert_ids_to_tokens(highest)!r}"
        raise invalid("tokenizer", tokenizer.name_or_path, f"{token}; must be below {known}, its model's embeddings")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of all that decides how text becomes tokens, and tokens text."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(truncation=None, padding=None)  # state of the last call, without effect on the next
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), _vocabulary_files(tokenizer)]
    options = [getattr(tokenizer, name, None) for name in ("split_special_tokens", "clean_up_tokenization_spaces")]
    libraries = [version("transformers"), version("tokenizers")]
    described = [
        rules,
        tokenizer.special_tokens_map,
        tokenizer.eos_token_id,
        tokenizer.chat_template,
        options,
        libraries,
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Digests of what a tokenizer without a backend of its own is read from: merges, a sentencepiece model."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(tokenizer.save_vocabulary(folder) or ())
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


def tokenize(sources: Sequence[OpenSource], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> list[TokenStore]:
    """The tokens of all documents of each source, from the cache where they have been made before.

    Plain text begins as the tokenizer begins it (`encode`), a conversation as its template does; EOS is appended where they
    do not end with it. With ``loss_on="answers"`` the tokens of the answers in conversations are marked, and all
    tokens of plain text beside them. Documents stream through; memory grows by 32 bytes per document.

    Raises:
        UserError: a source that cannot be read or has no document, no conversation for ``answers``.
    """
    # Worker processes are forked later; without this each of them prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    digest = tokenizer_digest(tokenizer)
    stores = [_stored(source, tokenizer, digest, loss_on) for source in sources]
    if loss_on == "answers" and all(store.answers is None for store in stores):
        raise invalid("loss_on", loss_on, "needs chat data (a column with messages), the source has plain text only")
    return stores


def _stored(source: OpenSource, tokenizer: PreTrainedTokenizerBase, digest: str, loss_on: LossOn) -> TokenStore:
    key = hashlib.sha256(json.dumps([VERSION, source.identity, digest, loss_on]).encode()).hexdigest()[:32]
    folder = cache_root() / "tokens" / key
    return TokenStore(build_once(folder, lambda part: _write(part, source, tokenizer, loss_on)))


def _write(folder: Path, source: OpenSource, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    starts, hashes, wordings, token_hashes = array("q", [0]), array("Q"), array("Q"), array("Q")
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "int32"
    chat = False
    shown: Any = {"unit": " documents", "delay": 2, "mininterval": 5, "leave": False, "disable": False}
    documents = tqdm(source.documents(), "tokenising", **shown)
    with (folder / f"tokens.{dtype}").open("wb") as tokens, (folder / "answers.bool").open("wb") as answers:
        for batch in batches(documents):
            chat = chat or any(not isinstance(document, str) for document in batch)
            try:
                for ids, marked in _encode(batch, tokenizer, loss_on):
                    tokens.write(np.asarray(ids, dtype).tobytes())
                    token_hashes.append(bytes_hash(np.asarray(ids, np.int64).tobytes() + marked.tobytes()))
                    if loss_on == "answers":
                        answers.write(marked.tobytes())
                    starts.append(starts[-1] + len(ids))
            except TooLongError as error:
                raise invalid("source", source.name, f"document {len(hashes) + len(batch)}: {error}") from error
            hashes.extend(map(document_hash, batch))
            wordings.extend(map(wording_hash, batch))
    if not hashes:
        raise invalid("source", source.name, "holds no documents with text")
    if not (loss_on == "answers" and chat):
        (folder / "answers.bool").unlink()
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    np.save(folder / "wordings.npy", np.array(wordings, dtype=np.uint64))
    np.save(folder / "token_hashes.npy", np.array(token_hashes, dtype=np.uint64))


def batches(documents: Iterable[DocumentT]) -> Iterator[list[DocumentT]]:
    """The documents, so many together that a tokenizer takes at once (`BATCH_CHARACTERS`)."""
    batch: list[DocumentT] = []
    characters = 0
    for document in documents:
        characters += len(str(document))
        if batch and characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], len(str(document))
        batch.append(document)
    if batch:
        yield batch


def _encode(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids of each document with EOS at the end, and which of them are answers."""
    want_answers = loss_on == "answers"
    for chat, group in itertools.groupby(documents, key=lambda document: not isinstance(document, str)):
        if not chat:
            for ids in encode(tokenizer, group, ends=True):  # type: ignore[arg-type]
                yield ids, np.ones(len(ids), bool)
            continue
        check_chat(tokenizer, want_answers)
        rendered = [render(document, tokenizer, want_answers) for document in group]
        # the template has already added the special tokens
        encoded = bare(tokenizer, [conversation.text for conversation in rendered], offsets=want_answers)
        for conversation, (ids, offsets) in zip(rendered, encoded):
            marked = mark_answers(offsets, conversation.answers) if want_answers else np.ones(len(ids), bool)
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids, marked = [*ids, tokenizer.eos_token_id], np.append(marked, not want_answers)
            yield ids, marked
