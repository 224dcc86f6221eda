"""Shared prefixes change the work, not the numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.eval.harness.language_model import SharedPrefixLM


def windowed(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model whose cache forgets: window 8, prefixes are longer."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def choices(documents: list[str]) -> list[Instance]:
    """Questions with 2 to 4 choices of different lengths, one of a single choice, one with a short context."""
    pairs = []
    for i, document in enumerate(documents):
        words = document.split()
        context = " ".join(words[: 30 + i % 2])
        pairs += [(context, " " + " ".join(words[j : j + 3 + j % 3])) for j in range(40, 40 + 10 * (i % 3 + 1), 10)]
    pairs += [("The", f" {word} that it was") for word in ("time", "way", "word")]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_same_scores_as_lm_eval(
    kind: str, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> None:
    model = teacher if kind == "full" else windowed(tokenizer)
    plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3, max_length=128)
    ours = SharedPrefixLM(model, tokenizer, name="teacher", max_length=128, batch_size=3)
    requests = choices(documents)
    expected, found = plain.loglikelihood(requests), ours.loglikelihood(requests)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    texts = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in documents]
    torch.testing.assert_close(
        torch.tensor(ours.loglikelihood_rolling(texts)),
        torch.tensor(plain.loglikelihood_rolling(texts)),
        atol=1e-3,
        rtol=1e-5,
    )


def test_a_shared_context_runs_once(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    context = " ".join(["word"] * 60)
    requests = [
        Instance("loglikelihood", {}, (context, f" {last}"), i) for i, last in enumerate(("a of", "is it", "we"))
    ]
    seen = []
    handle = teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(args[0].shape)), with_kwargs=True
    )
    try:
        SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=4).loglikelihood(requests)
    finally:
        handle.remove()
    length = len(tokenizer(context)["input_ids"])
    assert seen == [(1, length - 1), (3, 2)]


@pytest.mark.parametrize("long", [60, 1000])
def test_a_gpu_repeats_short_contexts(
    long: int, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each choice is a row of one batch then; the model is still on the CPU here."""
    monkeypatch.setattr("pl_attnedit.eval.harness.language_model.LONG_CONTEXT", long)
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=4)
    asked = [Instance("loglikelihood", {}, (" ".join(["word"] * 60), f" {last}"), 0) for last in ("a of", "is it")]
    expected, seen = lm.loglikelihood(asked), []
    monkeypatch.setattr(type(lm), "device", property(lambda lm: torch.device("meta")))
    monkeypatch.setattr(lm, "_score_after_prefix", lambda *rows: seen.append(rows) or expected)
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda lm, requests, *_: seen.append(requests) or expected)
    assert lm.loglikelihood(asked) == expected
    assert [len(rows) for rows in seen] == [3 if long == 60 else 2]


@pytest.mark.parametrize(("device", "rows"), [("cpu", 2), ("meta", 8)])
def test_a_gpu_gets_as_many_tokens_of_short_rows(
    device: str,
    rows: int,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=2)
    monkeypatch.setattr(type(lm), "device", property(lambda lm: torch.device(device)))
    with lm._rows(longest=30):
        assert lm.batch_size == rows
    assert lm.batch_size == 2


def test_contexts_of_one_length_share_a_batch(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=2)
    batches = list(lm._equal_lengths([(1, 2), (3, 4, 5), (5, 6), (7, 8)]))
    assert batches == [[(3, 4, 5)], [(1, 2), (5, 6)], [(7, 8)]]


def test_the_tokenizer_stays_as_it_was(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token is None
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=4)
    assert lm.tokenizer.pad_token is not None
    assert tokenizer.pad_token is None
