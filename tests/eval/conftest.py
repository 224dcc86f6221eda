"""Small random models of a real HF class, a small tokenizer, and documents with words and sentences."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path

import pytest
import torch
from fake_conversions import fake_store
from fake_suites import add_suites
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = """the a of and to in is that it as for was on are with they be at one have this from or had by hot but some what
there we can out other were all your when up use word how said each she which do their time if will way about"""


@pytest.fixture(scope="session")
def documents() -> list[str]:
    rng = random.Random(1)

    def sentence() -> str:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(5, 12))).capitalize() + ".\n"

    return ["".join(sentence() for _ in range(30)) for _ in range(6)]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def teacher(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_llama(tokenizer)


@pytest.fixture(scope="session")
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher with one damaged layer."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.mul_(0.5)
    return student


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """The URI of an MLflow store with five made-up conversions, and their run ids."""
    return fake_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def suites(store: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A copy of `store` in which conversions have evaluations of a suite that measures everything, or a failed one."""
    folder, (uri, ids) = tmp_path_factory.mktemp("suites"), store
    database = shutil.copy(Path(uri.removeprefix("sqlite:///")), folder)
    add_suites(f"sqlite:///{database}", folder, ids)
    return f"sqlite:///{database}", ids
