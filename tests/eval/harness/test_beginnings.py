"""Every task begins a text as training does, with tokenizers that add BOS, EOS, both or none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import FRAMES, framed
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import GateSWAConfig, edit_model
from pl_attnedit.cli import main
from pl_attnedit.eval.bench.init import sequences
from pl_attnedit.eval.fidelity.by_position import packed_sequences
from pl_attnedit.eval.fidelity.continuations import greedy_continuations
from pl_attnedit.eval.harness.answers import TaskRequest
from pl_attnedit.eval.harness.language_model import SharedPrefixLM
from pl_attnedit.eval.harness.paired import answer_both
from pl_attnedit.eval.harness.retrieval import build_retrieval_tasks
from pl_attnedit.eval.harness.tasks import build_bigbench_tasks, build_offline_tasks


@pytest.fixture(params=sorted(FRAMES))
def adding(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Any]:
    """What a tokenizer adds, and the tokenizer."""
    return request.param, framed(tokenizer, request.param)


def model_for(tokenizer: Any, teacher: PreTrainedModel) -> Any:
    """A copy of the tiny model that knows all tokens, and longer texts."""
    model = copy.deepcopy(teacher)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 512
    return model


def spy(model: Any, seen: list[tuple[int, list[int]]]) -> Any:
    """The model, which notes what is fed to it: tokens in its cache before, and each row."""

    def note(module: Any, args: Any, options: dict[str, Any]) -> None:
        ids, cache = args[0] if args else options["input_ids"], options.get("past_key_values")
        seen.extend((0 if cache is None else cache.get_seq_length(), row) for row in ids.tolist())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return model


@pytest.mark.parametrize(("begun", "longest"), [(False, 400), (True, 400), (False, 96)], ids=["plain", "begun", "cut"])
def test_what_tasks_feed_begins_as_in_training(
    begun: bool, longest: int, adding: tuple[str, Any], teacher: PreTrainedModel, documents: list[str], tmp_path: Path
) -> None:
    """Perplexity, cloze, BIG-bench, retrieval and copying, also of text that brings its BOS along."""
    kind, tokenizer = adding
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [(tokenizer.bos_token if begun else "") + text for text in documents]
    adds = kind in ("bos", "both")
    folder = build_offline_tasks(texts, tmp_path, n_documents=4, n_cloze=4, document_chars=150, context_chars=120)
    line = '{"question": "which word", "choices": ["time", "way"], "answer": 0}\n'
    (tmp_path / "q.jsonl").write_text(line * 3 + line.replace("which word", ""))
    names = ["heldout_perplexity", "heldout_cloze", *build_bigbench_tasks(tmp_path / "q.jsonl", folder)]
    sizes: dict[str, Any] = {"contexts": [300], "depths": [0.5], "samples": 2}
    build_retrieval_tasks(texts, tokenizer, folder, tasks=["needle_1", "copy"], **sizes)
    seen: list[tuple[int, list[int]]] = []
    model = spy(model_for(tokenizer, teacher), seen)
    requests = [TaskRequest(name, folder) for name in [*names, "needle_1", "copy"]]
    answer_both(model, model, tokenizer, requests, max_length=longest, batch_size=2)
    assert seen
    for before, row in seen:
        own = [token for token in row if token != eos]
        assert own[:2] != [bos, bos]
        if adds and not before:
            assert own[0] == bos
        if not begun:
            assert own.count(bos) == (adds and not before)


def test_perplexity_is_of_the_texts_own_tokens(
    adding: tuple[str, Any], teacher: PreTrainedModel, documents: list[str]
) -> None:
    """As the next-token distributions of training's sequences give it."""
    kind, tokenizer = adding
    model = model_for(tokenizer, teacher)
    text = documents[0][:200]
    lm = SharedPrefixLM(model, tokenizer, name="model", max_length=256, batch_size=2)
    requests = [Instance("loglikelihood_rolling", {}, (start + text,), i) for i, start in enumerate(["", "<bos>"])]
    found = lm.loglikelihood_rolling(requests[: 1 if kind in ("none", "eos") else 2])
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token_id if kind in ("bos", "both") else tokenizer.eos_token_id
    ids = torch.tensor([[first, *plain]])
    with torch.no_grad():
        logp = model(ids).logits.float().log_softmax(-1)[0, :-1]
    expected = logp.gather(-1, ids[0, 1:, None]).sum().item()
    assert found == pytest.approx([expected] * len(found), rel=1e-5)


def test_documents_are_joined_as_in_training(adding: tuple[str, Any], documents: list[str], tmp_path: Path) -> None:
    kind, tokenizer = adding
    begin = [tokenizer.bos_token_id] if kind in ("bos", "both") else []
    ids = []
    for text in documents:
        ids += [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert packed_sequences(documents, tokenizer, 2, len(ids) // 2).flatten().tolist() == ids[: len(ids) // 2 * 2]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in documents))
    found = sequences("heldout", str(tmp_path / "text.jsonl"), tokenizer, 2, len(ids) // 2)
    assert found.flatten().tolist() == ids[: len(ids) // 2 * 2]


def test_prompts_begin_as_in_training(
    adding: tuple[str, Any], teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, tokenizer = adding
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    seen: list[tuple[int, list[int]]] = []
    model = spy(model_for(tokenizer, teacher), seen)
    greedy_continuations(model, model, tokenizer, ["the time"], max_new_tokens=1)
    student = edit_model(model_for(tokenizer, teacher), GateSWAConfig(window=8, gate="none"), init="copy")
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    spy(student, seen)
    monkeypatch.setattr("pl_attnedit.load", lambda folder: student)
    for more in ([], ["--chat"]):
        assert main(["generate", str(tmp_path / "student"), "the time", "--max-new-tokens", "1", *more]) == 0
    plain = tokenizer("the time", add_special_tokens=False)["input_ids"]
    begun = [tokenizer.bos_token_id, *plain]
    alone = begun if kind in ("bos", "both") else plain
    assert [row for _, row in seen] == [alone, alone, alone, begun]
