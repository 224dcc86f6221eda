"""Instructions: each rule knows what follows it and what does not, and lm-eval asks and scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pl_attnedit.errors import UserError
from pl_attnedit.eval.harness.answers import TaskRequest, load_tasks
from pl_attnedit.eval.harness.instructions import RULES, build_instructions, process_results

PROSE = "We go by the river, and we sing."
# rule, its fields, what follows it, what does not
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("bullets", {"count": 2}, "- one\n- two\n", ["- one", "Here:\n- one\n- two", "- one\n- two\n- three"]),
    (
        "numbered",
        {"count": 3},
        "A list:\n1. a\n2. b\n3. c",
        ["1. a\n2. b", "1. a\n3. b\n2. c", "1. a\n2. b\n3. c\n4. d"],
    ),
    ("at_least", {"count": 8}, PROSE, ["We go by the river."]),
    ("at_most", {"count": 8}, PROSE, [PROSE + " Loudly.", "Few."]),
    ("sentence", {}, PROSE, [PROSE + " And more.", "We go by the river, and we sing", "Yes."]),
    ("keywords", {"keywords": ["river", "sing"]}, PROSE, ["We go by the rivers, and we sing."]),
    ("without", {"letter": "k"}, PROSE, ["We walk by the river, and sing.", "No."]),
    ("lowercase", {}, PROSE.lower(), [PROSE, "yes."]),
    (
        "json",
        {"keys": ["title", "year"]},
        '```json\n{"year": 1, "title": "a"}\n```',
        ['{"title": 1}', "{title: 1, year: 2}", "x"],
    ),
    ("begin", {"keyword": "apple"}, "Apple trees grow.", ["An apple tree.", "Apples grow."]),
    ("end", {"phrase": "The end."}, PROSE + " The end.", [PROSE, PROSE + " The end. Or not.", "The end."]),
    ("title", {}, "<<A river>>\nText", ["<A river>\nText", "Text <<A river>>"]),
]


@pytest.mark.parametrize(("rule", "fields", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_knows_what_follows_it(rule: str, fields: dict[str, Any], good: str, bad: list[str]) -> None:
    follows = RULES[rule].follows
    assert follows(good, **fields)
    assert not [text for text in ["", *bad] if follows(text, **fields)]


def test_every_rule_is_tried() -> None:
    assert [case[0] for case in CASES] == list(RULES)


def test_lm_eval_asks_and_scores(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build_instructions(tokenizer, tmp_path, 2 * len(RULES), 16)
    [task] = load_tasks([TaskRequest("instructions", tmp_path)])["instructions"]
    assert task.higher_is_better == {"acc": True, "rules": True}
    docs = list(task.task.eval_docs)
    assert len({doc["prompt"] for doc in docs}) == 2 * len(RULES)
    assert [doc["rules"][0]["rule"] for doc in docs] == 2 * list(RULES)
    both = next(doc for doc in docs if len(doc["rules"]) == 2 and doc["rules"][0]["rule"] == "end")
    phrase, count = (rule["fields"][name] for rule, name in zip(both["rules"], ("phrase", "count")))
    assert phrase in both["prompt"]
    assert str(count) in both["prompt"]
    words = "word " * count
    assert task.task.process_results(both, [words + phrase]) == {"acc": 1.0, "rules": 1.0}
    assert process_results(both, [words]) == {"acc": 0.0, "rules": 0.5}


def test_prompts_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
    try:
        build_instructions(tokenizer, tmp_path, 2, 16)
    finally:
        tokenizer.chat_template = None
    [task] = load_tasks([TaskRequest("instructions", tmp_path)])["instructions"]
    for doc in task.task.eval_docs:
        assert doc["prompt"] == f"[user] {doc['instruction']}[assistant]"


def test_more_than_there_are(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"instructions.samples = 481: must be at most 480"):
        build_instructions(tokenizer, tmp_path, 481, 16)
