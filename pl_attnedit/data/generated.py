"""Text written by the teacher itself: what it says unasked is a sample of what it knows, so no corpus is needed.

An instruct model is given its chat template up to where the user begins to speak; what it writes there is a question, which
it then answers (Magpie, arXiv:2406.08464). Any other model begins after its beginning-of-sequence token. Temperature 1 and
all tokens are the teacher's own distribution, the one that a student is to learn.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.data.encoding import apply_template, beginning, encode
from pl_attnedit.data.files import text_lines
from pl_attnedit.data.sources import document_hash
from pl_attnedit.data.tokens import check_vocabulary, tokenizer_digest
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import json_text, write_atomically, writing
from pl_attnedit.locks import LOCK, claim

SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string())])
FRUITLESS_BATCHES = 20  # consecutive batches without a new document after which we give up
T = TypeVar("T")
_MARK = "\ue000"  # stands for the user's message; no template contains it


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Args:
        prompts: "chat" = questions and answers, "none" = text from the first token on, "auto" = chat where the tokenizer has
            a chat template; else a text file with a prompt on each line: a user's message where there is a chat template,
            the beginning of a text otherwise. The lines are gone through as often as it takes.
        temperature: divides the logits; 1 = the teacher's own distribution.
        top_p: only the most likely tokens with this probability together; 1 = all.
        max_tokens: longest text, question or answer.
        batch_size: sequences at a time.
        seed: of everything; the same settings give the same text.
    """

    prompts: str = "auto"
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "must be at least 1")
        if not 1e-6 <= self.temperature < math.inf:
            raise invalid("temperature", self.temperature, "must be at least 1e-6")
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "must be above 0 and at most 1")


class TeacherWriter:
    """Writes batches of documents; each is a function of the settings and its number, whatever was written before."""

    def __init__(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.teacher, self.tokenizer, self.sampling = teacher, tokenizer, sampling
        stop = getattr(teacher.generation_config, "eos_token_id", None)
        stops = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
        if not stops:
            raise invalid("tokenizer", tokenizer.name_or_path, "must have an end-of-sequence token")
        self.stops = sorted(stops)
        self.beginning = beginning(tokenizer) or self.stops[:1]
        self.mode = sampling.prompts
        if self.mode == "auto":
            self.mode = "none" if tokenizer.chat_template is None else "chat"
        if self.mode == "chat" and tokenizer.chat_template is None:
            raise invalid("prompts", "chat", "needs a tokenizer with a chat template; give none")
        self.lines = [] if self.mode in ("chat", "none") else _lines(self.mode)
        known = teacher.config.get_text_config().vocab_size
        for part in [*(self._template() if tokenizer.chat_template else ()), *self.lines]:
            check_vocabulary(tokenizer, max(self._ids(part), default=0), known, f"the prompt {part[:40]!r}")
        longest = self._longest_text()
        if sampling.max_tokens > longest:
            raise invalid("max_tokens", sampling.max_tokens, f"must be at most {longest}, by the teacher's context")

    def _longest_text(self) -> int:
        """What is left of the context for a text; in chats question and answer have half of it each."""
        context = int(self.teacher.config.max_position_embeddings)
        template = sum(len(self._ids(part)) for part in self._template()) if self.tokenizer.chat_template else 0
        if self.mode == "chat":
            return (context - template) // 2
        lengths = [template + len(self._ids(line)) for line in self.lines]
        if max(lengths, default=0) > context - 2:
            line = self.lines[lengths.index(max(lengths))]
            problem = (
                f"the line that begins {line[:40]!r} leaves no room for a text, by the teacher's context of {context}"
            )
            raise invalid("prompts", self.mode, problem)
        return context - 1 - max(lengths, default=0)

    def write(self, number: int) -> list[str]:
        """The documents of a batch; fewer than its size where a question came to no end."""
        size = self.sampling.batch_size
        torch.manual_seed(document_hash(f"{self.sampling.seed} {number}"))  # on a CPU the lower 32 bits count
        if self.mode == "none":
            return [self._text(ids) for ids in self._continue([self.beginning] * size)]
        if self.mode != "chat":
            asked = [self.lines[(number * size + i) % len(self.lines)] for i in range(size)]
            return self._answer(asked) if self.tokenizer.chat_template else self._complete(asked)
        before, _ = self._template()
        questions = self._continue(encode(self.tokenizer, [before]) * size)
        complete = [self._text(ids).strip() for ids in questions if len(ids) < self.sampling.max_tokens]
        return self._answer([question for question in complete if question])

    def _answer(self, questions: list[str]) -> list[str]:
        before, after = self._template()
        prompts = [before + question + after for question in questions]
        answers = self._continue(encode(self.tokenizer, prompts)) if prompts else []
        return [prompt + self._text(ids) for prompt, ids in zip(prompts, answers)]

    def _complete(self, beginnings: list[str]) -> list[str]:
        written = self._continue(encode(self.tokenizer, beginnings))
        return [text + self._text(ids) for text, ids in zip(beginnings, written)]

    def _template(self) -> tuple[str, str]:
        """What the chat template puts before and after the user's message."""
        chat = [{"role": "user", "content": _MARK}]
        rendered = apply_template(self.tokenizer, chat, add_generation_prompt=True)
        before, _, after = rendered.partition(_MARK)
        return before, after

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    @torch.no_grad()
    def _continue(self, prompts: list[list[int]]) -> list[list[int]]:
        """What the teacher writes after each prompt, up to the token that ends it.

        On a GPU into a static cache, by a compiled step: a growing cache is copied at every token, and a small model waits
        for its launches. The step is compiled for one batch size, so a smaller batch is filled up.
        """
        compiled = self.teacher.device.type == "cuda"
        wanted = len(prompts)
        if compiled:
            prompts = prompts + prompts[:1] * (self.sampling.batch_size - wanted)
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stops[0]
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(  # overrides everything that the model's own config may set
            do_sample=True,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=self.sampling.max_tokens,
            eos_token_id=self.stops,
            pad_token_id=pad,
            cache_implementation="static" if compiled else None,
        )
        device, model = self.teacher.device, self.teacher
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=real.to(device), generation_config=settings
        )
        return [self._until_stop(row) for row in output[:wanted, longest:].tolist()]

    def _until_stop(self, row: list[int]) -> list[int]:
        return row[: next((place for place, token in enumerate(row) if token in self.stops), len(row))]


def generate_data(
    writer: TeacherWriter,
    name: str,
    path: Path,
    tokens: int,
    report: Callable[[int, int], None] = lambda documents, tokens: None,
    fingerprint: str = "",
) -> tuple[int, int]:
    """Writes at least `tokens` tokens of distinct documents to a parquet file with columns text and source.

    Every batch is a file in `PATH.parts` until the end, so a run that was interrupted goes on with the next batch.

    Args:
        name: of the teacher, for the column `source`.
        report: called after each batch with the numbers of documents and tokens so far.
        fingerprint: of the teacher; a run goes on with the teacher that began it alone.

    Returns:
        Numbers of documents and tokens.
    """
    if path.suffix != ".parquet":
        raise invalid("output", str(path), "must end in .parquet")
    if path.exists():
        raise invalid("output", str(path), "is there already; remove it or give another name")
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    lock = claim(parts / LOCK)
    if lock is None:
        raise invalid("output", str(path), "is being written by another process")
    with lock:
        teacher = {"teacher": name, "dtype": str(writer.teacher.dtype), "device": writer.teacher.device.type}
        content: dict[str, Any] = {"fingerprint": fingerprint, "tokenizer": tokenizer_digest(writer.tokenizer)}
        content["prompts_content"] = document_hash("\n".join(writer.lines))
        _settle(parts, {**teacher, **asdict(writer.sampling), **content})
        return _write_parts(writer, name, path, parts, tokens, report)


def _write_parts(
    writer: TeacherWriter, name: str, path: Path, parts: Path, tokens: int, report: Callable[[int, int], None]
) -> tuple[int, int]:
    source = f"{name} {writer.mode}"
    seen: set[int] = set()
    found = number = fruitless = 0
    while found < tokens:
        part = parts / f"{number:06}.parquet"
        if part.exists():
            texts = _read(part, lambda file: pq.read_table(file)["text"].to_pylist())
        else:
            hashes = {document_hash(text): text for text in writer.write(number) if text.strip()}
            texts = [text for key, text in hashes.items() if key not in seen]
            _write(part, lambda file: file.write_table(_table(texts, source)))  # noqa: B023
        seen.update(map(document_hash, texts))
        fruitless = 0 if texts else fruitless + 1
        if fruitless == FRUITLESS_BATCHES:
            raise UserError(
                f"{fruitless} batches brought no new text: no question came to an end, or all texts were there before; "
                "raise max_tokens, temperature or top_p"
            )
        found += sum(len(writer._ids(text)) for text in texts)
        number += 1
        report(len(seen), found)
    _write(path, lambda file: [file.write_table(pq.read_table(part)) for part in sorted(parts.glob("*.parquet"))])
    shutil.rmtree(parts)
    return len(seen), found


def _lines(path: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise invalid("prompts", path, "must be auto, chat, none or a text file, this is no file")
    lines = [line.strip() for line in text_lines("prompts", file)]
    if not any(lines):
        raise invalid("prompts", path, "has no line with text")
    return [line for line in lines if line]


def _settle(parts: Path, settings: dict[str, Any]) -> None:
    """The parts belong to one setting; those without any text to none."""
    known = parts / "settings.json"
    files = list(parts.glob("*.parquet"))
    if known.exists() and not any(_read(file, pq.read_metadata).num_rows for file in files):
        for file in files:
            file.unlink()
        known.unlink()
    if not known.exists():
        write_atomically(known, json_text(settings))
    else:
        before = _read(known, lambda file: dict(json.loads(file.read_text("utf-8"))))
        if changed := ", ".join(key for key in settings if before.get(key, settings[key]) != settings[key]):
            raise invalid(
                "output", str(parts), f"was begun with other settings ({changed} differ); remove it, or repeat them"
            )


def _read(file: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file among the parts; `UserError` where the file is broken."""
    try:
        return read(file)
    except (ValueError, TypeError, KeyError, OSError) as error:  # errors of Arrow and JSON are ValueErrors
        raise invalid("output", str(file), f"is broken ({error}); remove {file.parent} to begin anew") from error


def _table(texts: list[str], source: str) -> pa.Table:
    return pa.table({"text": texts, "source": [source] * len(texts)}, schema=SCHEMA)


def _write(path: Path, write: Callable[[pq.ParquetWriter], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with pq.ParquetWriter(temporary, SCHEMA) as file:
                write(file)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
