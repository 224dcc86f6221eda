"""Where BOS and EOS stand, with every kind of tokenizer, and the day that a chat template sees."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from typing import Any

import pytest
import transformers.utils.chat_template_utils as library
from fixtures_stages import FRAMES, framed
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit.data import TextDataModule, encoding
from pl_attnedit.data.encoding import bare, beginning, decode, encode
from pl_attnedit.data.generated import Sampling, TeacherWriter
from pl_attnedit.data.sources import open_source
from pl_attnedit.data.tokens import tokenize
from pl_attnedit.errors import UserError

CHAT = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "reads"}]


@pytest.fixture(params=sorted(FRAMES))
def adding(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[str, Any]:
    """What a tokenizer adds, and the tokenizer."""
    return request.param, framed(tokenizer, request.param)


def documents(data: TextDataModule) -> list[list[int]]:
    [store] = data.train_sequences.corpus.stores
    return [store.tokens[a:b].tolist() for a, b in zip(store.starts[:-1], store.starts[1:])]


def test_a_document_has_each_special_token_once(
    adding: tuple[str, Any], write_jsonl: Callable[..., str], make_text: Any
) -> None:
    """Plain, begun with BOS by whoever wrote it, ended with EOS, and both."""
    kind, tokenizer = adding
    bos, eos, text = tokenizer.bos_token, tokenizer.eos_token, make_text(1, 40)
    rows = [{"text": f"{before}{text}{after}"} for before in ("", bos) for after in ("", eos)]
    data = TextDataModule(
        tokenizer, write_jsonl(rows * 2 + [{"text": make_text(n, 40)} for n in range(4)]), 16, 1, val_sequences=1
    )
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    begun, ended = [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id], [*plain, tokenizer.eos_token_id]
    adds = kind in ("bos", "both")
    assert documents(data)[:4] == ([begun] * 4 if adds else [ended, ended, begun, begun])
    assert encode(tokenizer, [text]) == [begun[:-1] if adds else plain]
    assert beginning(tokenizer) == [tokenizer.bos_token_id if adds else tokenizer.eos_token_id]
    own = [
        [text for text in (text, bos + text) if encode(tokenizer, [text], ends=True) == [ids]]
        for ids in documents(data)[:4]
    ]
    assert [decode(tokenizer, ids) for ids in documents(data)[:4]] == [texts[0] for texts in own]
    [first, *_] = data.calibration_batches(16)
    packed = [token for document in data.train_sequences.documents for token in _document(data, document)]
    assert first["input_ids"][0].tolist() == packed[:16]


def _document(data: TextDataModule, index: int) -> list[int]:
    corpus = data.train_sequences.corpus
    start = corpus.starts[index]
    return corpus.stores[0].tokens[start : start + corpus.lengths[index]].tolist()


def test_a_conversation_begins_as_its_template_says(adding: tuple[str, Any], write_jsonl: Callable[..., str]) -> None:
    """Also where it was rendered before, and comes as text."""
    tokenizer = copy.deepcopy(adding[1])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    for row in ({"messages": CHAT}, {"text": rendered}):
        rows = [row, *({"messages": [CHAT[0], {**CHAT[1], "content": f"{n} " * 20}]} for n in range(9))]
        rows = [row] if "text" in row else rows
        more = [{"text": f"{n} " * 40} for n in range(9)] if "text" in row else []
        data = TextDataModule(tokenizer, write_jsonl([*rows, *more]), 8, 1, val_sequences=1)
        ids = documents(data)[0]
        assert all(tokens in documents(data) for tokens in encode(tokenizer, data.held_out_texts(), ends=True))
        assert ids[:2] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")]
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("prompts", ["none", "chat", "file"])
def test_what_a_teacher_writes_begins_as_in_training(
    prompts: str, adding: tuple[str, Any], make_teacher: Callable[..., Any], tmp_path: Any
) -> None:
    kind, tokenizer = adding
    if prompts == "file":
        tokenizer.chat_template = None
        (tmp_path / "lines").write_text("the model\n")
    teacher: PreTrainedModel = make_teacher("llama", vocab_size=len(tokenizer))
    teacher.generation_config.eos_token_id = list(range(100, 160))  # so that a random model ends its turns
    sampling = Sampling(str(tmp_path / "lines") if prompts == "file" else prompts, max_tokens=12, batch_size=4)
    writer, seen = TeacherWriter(teacher, tokenizer, sampling), []
    writer._continue = lambda rows, go_on=writer._continue: seen.extend(rows) or go_on(rows)  # type: ignore[method-assign,misc]
    assert writer.write(0)
    adds = kind in ("bos", "both")
    for ids in seen:
        assert ids.count(tokenizer.bos_token_id) == adds
        assert not adds or ids[0] == tokenizer.bos_token_id
        assert (tokenizer.eos_token_id in ids) == (prompts == "none" and not adds)


def test_a_template_sees_the_same_day_every_day(
    tokenizer: Any, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime(2031, 12, 24)

    dated = copy.deepcopy(tokenizer)
    today = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %A %-d.%m.%y') }}\n{% endif %}"
    dated.chat_template = today + tokenizer.chat_template
    source = write_jsonl([{"messages": [CHAT[0], {**CHAT[1], "content": f"{n} " * 20}]} for n in range(9)])
    found = []
    for day in range(2):
        monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / f"cache-{day}"))
        found.append(documents(TextDataModule(dated, source, 8, 1, val_sequences=1)))
        monkeypatch.setattr(library, "datetime", Later)
    assert found[0] == found[1]
    assert dated.decode(found[0][0]).startswith("26 Jul 2024, Friday 26.07.24\n<|im_start|>user")


def _llama_2() -> PreTrainedTokenizerFast:
    """As Llama 2: a space before every text, and no words, so that the whole text is one."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False, max_token_length=8)
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # of merges, but not of texts
    backend.train_from_iterator([" ".join(str(n) for n in range(3000))], trainer)
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE": 600, "_LOOKED_AT": 100, "UNBROKEN": 1000, "_AROUND": 60}.items():
        monkeypatch.setattr(encoding, name, value)


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "llama 2"])
def test_a_long_text_has_the_same_tokens_piece_by_piece(
    kind: str, tokenizer: Any, make_text: Any, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    text = "".join(f"{make_text(n, 20)}{' ' * (n % 4)}\n\t é{n}  " for n in range(40))
    if kind == "metaspace":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "llama 2":
        tokenizer = _llama_2()
        text = " ".join(str(n) for n in range(2000, 3000))
    asked: list[int] = []
    original = type(tokenizer).__call__

    def call(self: Any, texts: Any, **options: Any) -> Any:
        asked.append(max(map(len, [texts] if isinstance(texts, str) else texts)))
        return original(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    [(ids, offsets)] = bare(tokenizer, [text], offsets=True)
    assert len(text) > 3000 > 600 >= max(asked)
    whole = original(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == whole["input_ids"]
    if kind != "llama 2":  # whose first token of a text claims no character of the space put before it
        assert [tuple(each) for each in offsets.tolist()] == whole["offset_mapping"]


def test_a_text_without_a_place_to_cut_it_is_named(
    tokenizer: Any, small_pieces: None, write_jsonl: Callable[..., str]
) -> None:
    assert list(bare(tokenizer, ["x" * 900]))  # is one piece
    source = open_source(write_jsonl([{"text": "one two"}, {"text": "x" * 3000}]))
    with pytest.raises(UserError, match=r"data\.jsonl': document 2: 1,000 of its 3,000 characters have no white"):
        tokenize([source], tokenizer, "all")


def test_answers_of_a_long_conversation(
    tokenizer: Any, make_text: Any, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"role": role, "content": make_text(n, 90)} for n, role in enumerate(["user", "assistant"] * 4)]
    source = open_source(write_jsonl([{"messages": chat}]))
    [whole] = tokenize([source], tokenizer, "answers")
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", f"{whole.path}-again")
    for name, value in {"PIECE": 600, "_LOOKED_AT": 100}.items():
        monkeypatch.setattr(encoding, name, value)
    [parts] = tokenize([source], tokenizer, "answers")
    assert parts.path != whole.path
    assert whole.tokens.tolist() == parts.tokens.tolist()
    assert whole.answers is not None
    assert parts.answers is not None
    assert whole.answers.tolist() == parts.answers.tolist()
