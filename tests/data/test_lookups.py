"""Text in which facts are said again far back: its documents, and that nothing of it is judged on."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pl_attnedit.data import TextDataModule, sources
from pl_attnedit.data.lookups import CHARACTERS_PER_GROUP, FORMS, LIST_BEGINNINGS, LONG, WORDS, lookup_documents
from pl_attnedit.data.sources import Source, document_hash, open_source, wording_hash
from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness import retrieval


def write(path: Path, documents: int, words: str = "plain") -> str:
    path.write_text("\n\n".join(f"The {words} text {i} goes on. " * 600 for i in range(documents)), "utf-8")
    return str(path)


def test_facts_are_said_again_and_the_source_is_kept_in_order(tmp_path: Path) -> None:
    base = write(tmp_path / "a.txt", 300)
    documents = list(open_source(f"lookups:{base}").documents())
    assert documents == list(open_source(f"lookups:{base}").documents())
    characters = sum(len(text) for text in open_source(base).documents() if isinstance(text, str))
    assert 0.05 < sum(map(len, documents)) / characters < 0.25
    beginnings = {form.split("{")[0] for form in FORMS if not form.startswith("{")} | set(LIST_BEGINNINGS)
    for text in documents:
        assert isinstance(text, str)
        lines = text.replace("As said: ", "").replace("Again, ", "").replace("\n", " ").split("The plain text ")
        numbers = [int(part.split()[0]) for part in lines[1:] if part.split()[0].isdigit()]
        assert numbers == sorted(numbers)
    assert max(map(len, documents)) > LONG[0] > CHARACTERS_PER_GROUP
    assert all(any(beginning in text for text in documents) for beginning in beginnings)
    facts = Counter(fact for text in documents for fact in re.findall(r"\w+ \w+ lives in \w+\.", text))
    assert facts
    assert min(facts.values()) >= 2


def test_the_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a.txt", 2), write(tmp_path / "b.txt", 3)
    keys = {open_source(f"lookups:{file}").identity for file in (a, a, b)} | {open_source(a).identity}
    monkeypatch.setattr(sources, "LOOKUPS_VERSION", 0)
    assert len(keys | {open_source(f"lookups:{a}").identity}) == 4


def test_the_tasks_that_judge_have_other_words_and_forms() -> None:
    used = {word.lower() for words in WORDS for word in words}
    assert used.isdisjoint(retrieval.WORDS.split())
    assert not any("secret" in form or "list is" in form.lower() for form in (*FORMS, *LIST_BEGINNINGS))


def test_nothing_that_it_has_pieces_of_is_judged_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base, other = write(tmp_path / "a.txt", 60), write(tmp_path / "b.txt", 20, "other")
    lookups = f"lookups:{base}"

    def module(source: list[str | Source], val_source: str | None = other) -> TextDataModule:
        data = TextDataModule(tokenizer, source, seq_len=64, val_sequences=2, val_source=val_source)
        data.setup()
        return data

    with pytest.raises(
        UserError, match=r"is for training, beside the source that it has pieces of: name .*a\.txt beside it"
    ):
        module([lookups])
    with pytest.raises(UserError, match=r"val_source = None: must be given: lookups:.* has pieces of whatever is held"):
        module([base, lookups], None)
    with pytest.raises(UserError, match=r"val_source = 'lookups:.*': must be text as it is, lookups: is for training"):
        module([base, lookups], lookups)
    with pytest.raises(UserError, match=r"holds 55 documents of .*a\.txt, and lookups:.* has pieces of it"):
        module([base, lookups, other], base)
    data = module([Source(base, weight=9), Source(lookups, weight=1)])
    share = data.train_sequences.per_epoch()[1] / len(data.train_sequences)
    assert share == pytest.approx(0.1, abs=0.01)
    trained = [*open_source(base).documents(), *open_source(lookups).documents()]
    identities = {of(each) for each in trained for of in (document_hash, wording_hash)}
    assert set(data.training_documents.documents.tolist()) == identities


def test_other_columns_of_the_same_file_are_another_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {name: [" ".join([f"The {name} text {i} goes on."] * 200) for i in range(40)] for name in ("text", "body")}
    rows = [dict(zip(texts, row)) for row in zip(*texts.values())]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "val.txt").write_text(texts["body"][3], "utf-8")
    file, val_source = str(tmp_path / "both.jsonl"), str(tmp_path / "val.txt")

    def setup(*columns: str) -> None:
        source: list[str | Source] = [Source(file, column=column) for column in columns]
        lookups = Source(f"lookups:{file}", column="body")
        TextDataModule(tokenizer, [*source, lookups], seq_len=64, val_sequences=2, val_source=val_source).setup()

    with pytest.raises(UserError, match=r"both\.jsonl beside it with the same config, split and column"):
        setup("text")
    with pytest.raises(UserError, match=r"holds 1 documents of .*both\.jsonl, and lookups:.* has pieces of it"):
        setup("text", "body")


@pytest.mark.parametrize(
    "text",
    ["这是一个没有空格的句子。" * 3000, "no end of a sentence " * 2000, "x" * 40_000, "a b" + " " * 300_000 + "c. d"],
)
def test_facts_stand_between_pieces_of_text_without_sentences(text: str) -> None:
    for document in lookup_documents("x", [text]):
        places = [found.start() / len(document) for found in re.finditer(r"\d{2,}|[A-Z]\w+ [A-Z]\w+", document)]
        assert min(places) < 0.5
        longest = max(map(len, re.split(r"(?<=[。\s])", document)))
        assert longest <= 1_200


def test_a_source_of_conversations_has_no_stretches(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n', "utf-8")
    with pytest.raises(UserError, match=r"source = 'lookups:.*chat\.jsonl': must be of a source with plain text"):
        list(open_source(f"lookups:{tmp_path}/chat.jsonl").documents())


def test_short_text_gives_one_document(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only this. And that.", "utf-8")
    [document] = open_source(f"lookups:{tmp_path}/short.txt").documents()
    assert "Only this." in str(document)
    assert len(str(document)) > 60
