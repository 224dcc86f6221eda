"""A tiny teacher in a folder of its own with a tokenizer, text for it, and Trainers: what tests of the stages share."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pl_attnedit.data import TextDataModule
from pl_attnedit.distillation import LayerwiseDistillation, ModelDistillation

WORDS = ["the", "model", "reads", "a", "line", "of", "text", "and", "learns", "which", "word", "may", "follow", "it"]
WINDOW = {"type": "gate_swa", "window": 8, "sinks": 1}
LATENT = {"type": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4}
STATE = {"type": "gated_deltanet", "conv_kernel": 2}


def document(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return f"Document {seed}. " + " ".join(rng.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([document(seed, 100) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_max_length=512)


FRAMES = {"none": "$A", "bos": "<bos> $A", "eos": "$A {eos}", "both": "<bos> $A {eos}"}


def framed(tokenizer: PreTrainedTokenizerFast, kind: str) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that has a BOS token, and adds BOS, EOS, both or none to a text."""
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"bos_token": "<bos>"})
    eos = copied.eos_token
    ids = [("<bos>", copied.bos_token_id), (eos, copied.eos_token_id)]
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single=FRAMES[kind].format(eos=eos), pair=None, special_tokens=ids
    )
    return copied


@pytest.fixture(scope="session")
def teacher_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make_teacher: Callable[..., Any]
) -> Callable[..., str]:
    """`teacher_folder(family="llama")`: the folder of a tiny random teacher with its tokenizer."""
    made: dict[str, str] = {}

    def make(family: str = "llama") -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make_teacher(family, vocab_size=300).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return make


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache_of_tests(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(session_cache))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 documents of 400 to 459 words, as .jsonl."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document(seed, 400 + seed)}) + "\n" for seed in range(60)), "utf-8")
    return str(path)


@pytest.fixture
def make_data(tiny_corpus: str, teacher_folder: Callable[..., str]) -> Callable[..., TextDataModule]:
    """`make_data(**options)`: batches of 2 x 32 tokens, 5 held-out sequences (the last batch is smaller)."""

    def make(**options: Any) -> TextDataModule:
        defaults = {"source": tiny_corpus, "seq_len": 32, "batch_size": 2, "val_sequences": 5}
        return TextDataModule(teacher_folder(), **(defaults | options))

    return make


@pytest.fixture
def make_stage1(teacher_folder: Callable[..., str]) -> Callable[..., LayerwiseDistillation]:
    def make(family: str = "llama", targets: Any = WINDOW, **options: Any) -> LayerwiseDistillation:
        defaults = {"calibration_tokens": 128, "learning_rate": 3e-3, "warmup_steps": 2, "pattern": "SSFS"}
        module = LayerwiseDistillation(teacher_folder(family), targets, **(defaults | options))
        torch.manual_seed(0)  # a random init is the same in each run
        return module

    return make


@pytest.fixture
def make_stage2(teacher_folder: Callable[..., str]) -> Callable[..., ModelDistillation]:
    def make(family: str = "llama", targets: Any = WINDOW, **options: Any) -> ModelDistillation:
        defaults = {"calibration_tokens": 128, "learning_rate": 3e-3, "warmup_steps": 2, "pattern": "SSFS"}
        module = ModelDistillation(teacher_folder(family), targets, **(defaults | options))
        torch.manual_seed(0)  # a random init is the same in each run
        return module

    return make


def unfreezing(**options: Any) -> dict[str, Any]:
    """The callback as a recipe names it."""
    return {"class_path": "pl_attnedit.callbacks.ProgressiveUnfreezing", "init_args": options}


class Losses(Callback):
    """The loss of every batch, as the module has logged it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def make_trainer(*callbacks: Callback, steps: int = 6, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that a model holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def subprocess_environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PL_ATTNEDIT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
