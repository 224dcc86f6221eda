"""Plans out of scores, and the file that holds the scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pl_attnedit import UserError
from pl_attnedit.modeling.ranking import Sensitivity, spread_evenly

SCORES = Sensitivity({"S": [0.1, 0.4, 0.2, 0.3], "M": [0.05, 0.1, 0.19, 0.01]})
CACHED = {"F": [100] * 4, "S": [10] * 4, "M": [40] * 4}


@pytest.mark.parametrize(
    ("letters", "budget", "plan"),
    [
        ("S", 0.1, "SSSS"),
        ("S", 0.3, "SSSS"),  # a full layer more would be 32.5%
        ("S", 0.325, "SFSS"),
        ("S", 0.55, "SFSF"),
        ("S", 1.0, "FFFF"),
        ("SM", 0.1, "SSSS"),
        ("SM", 0.175, "SMSS"),  # 0.3 / 30 bytes beats the full layer's 0.4 / 90
        ("SM", 0.25, "SMSM"),
        ("SM", 0.475, "SMFM"),  # for layer 2 M is hardly better than S, a full layer is
    ],
)
def test_plan_spends_the_budget_where_it_pays_most(letters: str, budget: float, plan: str) -> None:
    scores = Sensitivity({letter: SCORES.cost[letter] for letter in letters})
    assert scores.plan({letter: CACHED[letter] for letter in letters + "F"}, budget) == plan


def test_of_letters_that_cache_the_same_the_better_one_is_taken() -> None:
    scores = Sensitivity({"A": [0.3, 0.1], "B": [0.1, 0.2]})
    assert scores.plan({"F": [100] * 2, "A": [10] * 2, "B": [10] * 2}, 0.1) == "BA"


@pytest.mark.parametrize("budget", [0.05, 1.5])
def test_budget_that_cannot_be_kept(budget: float) -> None:
    with pytest.raises(UserError, match=r"budget = .*: must be from 0.1000, all layers edited, to 1"):
        SCORES.plan(CACHED, budget)


def test_order_is_the_most_sensitive_layer_first() -> None:
    assert SCORES.order("SSSS") == [1, 3, 2, 0]
    assert SCORES.order("MSFM") == [1, 0, 3]
    with pytest.raises(UserError, match="sensitivity = 'S': was not measured for 3 layers; there are S for 4 layers"):
        SCORES.order("SSF")


@pytest.mark.parametrize(
    ("letters", "even"), [("FFSS", "SFSF"), ("FSSSSSS", "SSSSSSF"), ("FFF", "FFF"), ("FFSSSSSS", "SSSFSSSF")]
)
def test_spread_evenly(letters: str, even: str) -> None:
    assert spread_evenly(letters, "S") == even


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": {"S": [1]}}', '{"layers": {"S": [{"kl": NaN}]}}'])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="is no file of `pl-attnedit sensitivity`"):
        Sensitivity.read(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read"):
        Sensitivity.read(tmp_path / "none.json")


def test_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"layers": {"S": [{"kl": 0.5, "top1": 1.0}, {"kl": 0.25}]}}))
    assert Sensitivity.read(tmp_path / "x.json") == Sensitivity({"S": [0.5, 0.25]})
