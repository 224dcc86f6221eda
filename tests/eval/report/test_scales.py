"""Axes have round ticks, and names beside points do not cover one another."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from pl_attnedit.eval.report.scales import (
    Axis,
    Box,
    apart,
    contexts,
    linear,
    logarithmic,
    pareto_front,
    percent,
    place,
    tick_label,
)


@pytest.mark.parametrize(("low", "high"), [(0, 0.1), (3, 98), (-1, 1), (5, 5), (0, 400), (1e-5, 3e-5)])
def test_linear(low: float, high: float) -> None:
    for widen in (True, False):
        axis = linear("", [low, high], widen=widen)
        assert axis.low <= low <= high <= axis.high
        assert 0 <= axis.share(low) <= axis.share(high) <= 1
        assert all(axis.low - 1e-9 <= tick <= axis.high + 1e-9 for tick in axis.ticks)
        assert 2 <= len(axis.ticks) == len(axis.labels) <= 9
    assert linear("", [0, 380], unit="%").labels == ["0%", "100%", "200%", "300%", "400%"]


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.3), (0.09, 0.11), (1e-6, 10), (2, 2)])
def test_logarithmic(low: float, high: float) -> None:
    axis = logarithmic("", [low, high])
    assert 0 < axis.share(low) <= axis.share(high) < 1
    assert axis.ticks
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert logarithmic("", [0.1, 10]).share(1.0) == pytest.approx(0.5)


def test_many_decades_have_few_ticks() -> None:
    assert 3 <= len(logarithmic("", [1e-30, 1e30]).ticks) <= 9


def test_tick_labels() -> None:
    assert [tick_label(v) for v in (0.05, 1000, 12000, 3e6, 3e-5)] == ["0.05", "1,000", "12k", "3M", "3e-05"]


def test_percentages_end_at_a_hundred() -> None:
    assert (percent("", [88.0]).high, percent("", [88.0]).labels[-1]) == (100, "100%")
    assert percent("", [100.0, 100.0]).low == 0


def test_contexts_have_a_tick_each() -> None:
    axis = contexts("", [512, 8192, 1024])
    assert axis.labels == ["512", "1k", "8k"]
    assert axis.share(2048) - axis.share(1024) == pytest.approx(axis.share(1024) - axis.share(512))
    assert contexts("", [4096]).ticks == [4096]


def test_names_are_moved_apart() -> None:
    heights = apart([20, 22, 90, 95, 99], lowest=100)
    assert min(b - a for a, b in pairwise(heights)) >= 16
    assert heights[0] == 20
    assert heights[-1] == 100


def test_names_find_a_place_or_none() -> None:
    inside: Box = (0, 0, 300, 200)
    taken: list[Box] = [(93, 93, 107, 107)]
    found = [place(100, 100, 60, inside, taken) for _ in range(8)]
    assert found[0] == (108, 94, "left")
    assert found[-1] is None
    assert len(taken) == 1 + sum(spot is not None for spot in found)
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(taken, 2))
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 300 and box[3] <= 200 for box in taken)


def test_share_of_a_named_axis() -> None:
    assert Axis("", -0.1, 2, range(3), ("before", "stage 1", "stage 2")).share(2) == 1


def test_pareto_front() -> None:
    assert pareto_front([(50, 0.1), (30, 0.3), (40, 0.3), (60, 0.2), (30, 0.4)]) == [(30, 0.3), (50, 0.1)]
    assert pareto_front([]) == []
