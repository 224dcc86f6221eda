"""A small corpus, a tokenizer trained on it, and a cache folder of each test's own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "model", "reads", "a", "line", "of", "text", "and", "learns", "which", "word", "may", "follow", "it"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
)


def _make_text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return f"Document {seed}. " + " ".join(rng.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture
def make_text() -> Callable[[int, int], str]:
    """A document from a seed and a number of words."""
    return _make_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_make_text(seed, 100) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Sequence[dict], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


@pytest.fixture
def corpus(write_jsonl: Callable[..., str]) -> str:
    """60 documents of 20 to 79 words."""
    return write_jsonl([{"text": _make_text(seed, 20 + seed)} for seed in range(60)], "corpus.jsonl")
