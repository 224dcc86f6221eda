"""Shared prefixes change the work, not the numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.data import tokens
from pl_attnedit.data.encoding import encode
from pl_attnedit.eval.harness import language_model
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


def test_contexts_of_one_length_share_a_batch(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, seen = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=2), []
    monkeypatch.setattr(lm, "_score_after_prefix", lambda prefixes, copies, _: seen.append(prefixes) or copies)
    contexts = [(1, 2), (3, 4, 5), (5, 6), (7, 8)]
    with lm._progress(None, "choices"):
        lm._loglikelihood_tokens([(None, list(context), [last]) for context in contexts for last in (9, 10)])
    assert seen == [[(3, 4, 5)], [(1, 2), (5, 6)], [(7, 8)]]


def test_texts_become_tokens_once(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context with each of its choices, and by itself, few at a time where long; as lm-eval would find them."""
    asked = [
        Instance("loglikelihood", {}, (context, f"{last}"), i)
        for i, (context, last) in enumerate([("word " * 20, " a"), ("word " * 20, "of"), ("is it ", " "), ("", "we")])
    ]
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=4)
    expected = [lm._encode_pair(*each.args) for each in asked if each.args[0]]
    together: list[list[str]] = []
    monkeypatch.setattr(language_model, "encode", lambda of, texts: together.append(texts) or encode(of, texts))
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 220)
    given: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, **_: given.extend((c, a) for _, c, a in requests))
    lm.loglikelihood(asked)
    assert given[:3] == expected
    assert [len(texts) for texts in together] == [2, 4]
    assert len({text for texts in together for text in texts}) == 6


@pytest.mark.parametrize("kind", ["after a context", "whole rows", "generation"])
def test_the_batch_is_halved_where_memory_does_not_suffice(
    kind: str, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That batch alone is tried again, and later ones are as small."""
    sizes: list[int] = []

    def hungry(module: Any, args: Any, kwargs: Any) -> None:
        rows = (args[0] if args else kwargs["input_ids"]).shape[0]
        sizes.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(language_model, "LARGEST_BATCH", {"cpu": 8})
    words = "a of is it we the to and".split()  # noqa: SIM905
    if kind == "generation":
        arguments: list[Any] = [(word, {"until": ["."], "max_gen_toks": 2, "do_sample": False}) for word in words]
    else:
        contexts = [f"{word} " + "word " * (20 if kind == "after a context" else 0) for word in words]
        arguments = [(context, choice) for context in contexts for choice in ("x", "y")[: 1 + (len(context) > 9)]]
    asked = [Instance("generate_until", {}, each, i) for i, each in enumerate(arguments)]

    def ask(batch_size: int | str) -> Any:
        lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=64, batch_size=batch_size)
        found = lm.generate_until(asked) if kind == "generation" else lm.loglikelihood(asked)
        return found, lm.batch_size

    expected, _ = ask(2 if kind != "after a context" else 1)
    handle = teacher.register_forward_pre_hook(hungry, with_kwargs=True)
    try:
        found, size = ask("auto")
        for one, same in zip(found, expected, strict=True):
            assert one == same if kind == "generation" else one[0] == pytest.approx(same[0], abs=1e-4)
        assert size == (1 if kind == "after a context" else 2)  # two choices after each context
        assert sum(rows > 2 for rows in sizes) == 2 + (
            kind == "after a context"
        )  # 8 and 4; there 2 with two choices each
        with pytest.raises(torch.OutOfMemoryError):
            ask(4)  # a number is taken as it is
    finally:
        handle.remove()


def test_the_tokenizer_stays_as_it_was(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token is None
    lm = SharedPrefixLM(teacher, tokenizer, name="teacher", max_length=128, batch_size=4)
    assert lm.tokenizer.pad_token is not None
    assert tokenizer.pad_token is None
