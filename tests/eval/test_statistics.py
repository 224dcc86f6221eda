"""Known values, and simulations in which the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pl_attnedit.errors import UserError
from pl_attnedit.eval import statistics
from pl_attnedit.eval.statistics import (
    bits_per_unit,
    detectable_proportions,
    holm,
    non_inferiority,
    paired_aggregate,
    paired_proportions,
    perplexity,
    tango_interval,
)


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    teacher = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return teacher, [1] * both + [1] * gained + [0] * lost + [0] * neither


def test_tango_published_example() -> None:
    # Airway hyper-responsiveness: Fagerland, Lydersen and Laake, BMC Med. Res. Methodology 14 (2014), 133.
    assert tango_interval(gained=1, lost=7, n=21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert tango_interval(gained=7, lost=1, n=21) == pytest.approx((0.026, 0.517), abs=5e-4)


def test_tango_inverts_its_score_test() -> None:
    # Without discordant pairs the limits have a closed form; with all pairs discordant they end at -1 and 1.
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)
    assert tango_interval(0, 9, 9)[0] == -1
    assert tango_interval(9, 0, 9)[1] == 1


def test_mcnemar_known_value() -> None:
    found = paired_proportions(*answers(both=1, gained=1, lost=7, neither=12))
    assert found.p_value == pytest.approx(2 * (1 + 8) / 2**8)
    assert (found.n, found.teacher, found.student) == (21, pytest.approx(8 / 21), pytest.approx(2 / 21))
    assert found.difference == pytest.approx(-6 / 21)


def test_teacher_against_itself() -> None:
    same = paired_proportions([1, 0, 1, 1], [1, 0, 1, 1])
    assert (same.difference, same.p_value) == (0, 1)
    assert same.ci_low == pytest.approx(-same.ci_high)
    values = [-3.0, -4.5, -2.25]
    same = paired_aggregate(values, values, [3, 4, 2], perplexity)
    assert (same.difference, same.ci_low, same.ci_high, same.p_value) == (0, 0, 0, 1)


# (gained, lost): shares of the pairs that only the student, only the teacher has right
RATES = ((0.05, 0.05), (0.10, 0.10), (0.05, 0.10), (0.08, 0.16), (0.02, 0.12))


@pytest.mark.parametrize("n", [50, 100, 200, 500, 1000, 2000])
def test_tango_coverage_and_mcnemar_level(n: int) -> None:
    """10,000 draws where the models differ on 10% to 24% of the pairs. Where fewer than five pairs are to differ (4% of
    100) the counts are so few that the interval covers more: the last lines."""
    rng = np.random.default_rng(n)
    for gained, lost in RATES:
        covered, rejected = simulate(rng, n, gained, lost)
        assert 0.94 <= covered <= 0.96, (gained, lost)
        if gained == lost:
            assert rejected <= 0.05
    covered, rejected = simulate(rng, n, 0.02, 0.02)
    assert 0.94 <= covered <= (0.96 if n > 100 else 1)
    assert rejected <= 0.05


def simulate(rng: np.random.Generator, n: int, gained: float, lost: float, draws: int = 10_000) -> tuple[float, float]:
    """The share of draws whose interval holds the truth, and of those with p below 0.05."""
    counts, drawn = np.unique(
        rng.multinomial(n, (gained, lost, 1 - gained - lost), size=draws)[:, :2], axis=0, return_counts=True
    )
    limits = np.array([tango_interval(int(g), int(b), n) for g, b in counts])
    covered = (limits[:, 0] <= gained - lost) & (gained - lost <= limits[:, 1])
    return float(covered @ drawn / draws), float((mcnemar(counts) < 0.05) @ drawn / draws)


def mcnemar(counts: np.ndarray) -> np.ndarray:
    """Exact p-values for (gained, lost), vectorised: `paired_proportions` takes them from scipy one by one."""
    return np.minimum(1, 2 * stats.binom.cdf(counts.min(1), counts.sum(1), 0.5))


def test_the_simulated_p_values_are_those_reported() -> None:
    for gained, lost in ((0, 0), (3, 3), (1, 7), (9, 2)):
        found = paired_proportions(*answers(both=10, gained=gained, lost=lost, neither=5))
        assert mcnemar(np.array([[gained, lost]]))[0] == pytest.approx(found.p_value)


@pytest.mark.parametrize("n", [50, 300, 2000])
def test_holm_keeps_the_error_of_a_family(n: int) -> None:
    """10,000 suites of six tasks, two of which are really worse: how often is one of the other four called different?"""
    rng = np.random.default_rng(n)
    same, worse = (0.06, 0.06, 0.88), (0.03, 0.15, 0.82)
    counts = np.stack([rng.multinomial(n, rates, size=10_000)[:, :2] for rates in (*[same] * 4, worse, worse)])
    p = np.stack([mcnemar(of_task) for of_task in counts]).T
    adjusted = np.array([holm(row) for row in p])
    assert (adjusted[:, :4] < 0.05).any(1).mean() <= 0.05
    assert (p[:, :4] < 0.05).any(1).mean() > 0.05 or n == 50, "without Holm it would be too often"


@pytest.mark.parametrize(("n", "discordance"), [(50, 0.3), (200, 0.1), (1000, 0.2)])
def test_the_detectable_difference_is_found_four_times_in_five(n: int, discordance: float) -> None:
    half = round(n * discordance / 2)
    delta = detectable_proportions(half, half, n)
    assert delta is not None
    rate = max((2 * half + 1) / (n + 2), delta)
    gained, lost = (rate - delta) / 2, (rate + delta) / 2
    assert simulate(np.random.default_rng(n), n, gained, lost)[1] == pytest.approx(0.8, abs=0.015)


def test_what_cannot_be_detected() -> None:
    assert detectable_proportions(0, 0, 5) is None, "five pairs never reach p < 0.05"
    assert detectable_proportions(0, 0, 200) == pytest.approx(8 / 200, rel=0.05), "no zero where no pair differed"
    assert paired_aggregate([1.0, 2.0], [1.0, 2.0]).mde is None
    few, many = (detectable_proportions(n // 20, n // 20, n) for n in (200, 2000))
    assert few is not None
    assert many is not None
    assert few > 3 * many


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (-0.005, 0.02, True, "non-inferior"),
        (-0.03, 0.02, True, "inconclusive"),
        (-0.04, -0.02, True, "inferior"),
        (-0.009, -0.001, True, "non-inferior"),  # significantly worse, but by less than the margin
        (-0.02, 0.005, False, "non-inferior"),
        (-0.02, 0.03, False, "inconclusive"),
        (0.02, 0.04, False, "inferior"),
        (-0.01, 0.01, True, "inconclusive"),
    ],
)
def test_non_inferiority(low: float, high: float, higher_is_better: bool, expected: str) -> None:
    assert non_inferiority(low, high, 0.01, higher_is_better) == expected


@pytest.mark.parametrize("n", [500, 2000])
def test_a_student_at_the_margin_is_seldom_called_non_inferior(n: int) -> None:
    rng, margin = np.random.default_rng(n), 0.03
    counts = rng.multinomial(n, (0.05, 0.05 + margin, 0.9 - margin), size=10_000)[:, :2]
    counts, drawn = np.unique(counts, axis=0, return_counts=True)
    passed = [non_inferiority(*tango_interval(int(g), int(b), n), margin, True) == "non-inferior" for g, b in counts]
    assert np.array(passed) @ drawn / 10_000 == pytest.approx(0.025, abs=0.006)


def documents(rng: np.random.Generator, n: int, harm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihoods of teacher and student and lengths; documents differ far more than the models do."""
    length = rng.lognormal(6, 0.3, n)
    nats, noise = rng.normal(2.0, 0.4, n), rng.normal(0, 0.05, n)
    return -length * nats, -length * (nats + harm + noise), length


@pytest.mark.parametrize("n", [6, 30])
def test_bootstrap_with_few_documents(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    covered, rejected = bootstrap(n, 300, 999, monkeypatch, null=300)
    assert 0.90 < covered < 0.985
    assert rejected < 0.085


@pytest.mark.slow
@pytest.mark.parametrize(("n", "draws", "null"), [(50, 10_000, 10_000), (200, 10_000, 1000), (2000, 1000, 0)])
def test_bootstrap_coverage(n: int, draws: int, null: int, monkeypatch: pytest.MonkeyPatch) -> None:
    covered, rejected = bootstrap(n, draws, 999, monkeypatch, null=null)
    luck = 0.0 if draws == 10_000 else 1.4 * math.sqrt(0.05 * 0.95 / draws)
    assert 0.94 - luck <= covered <= 0.96 + luck
    assert rejected <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / max(null, 1))


def test_bootstrap_coverage_in_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    covered, _ = bootstrap(50, 4000, 999, monkeypatch, null=0)
    assert 0.935 <= covered <= 0.965  # 94% to 96%, and 1.4 standard errors of 4,000 draws


def bootstrap(n: int, draws: int, resamples: int, monkeypatch: pytest.MonkeyPatch, null: int) -> tuple[float, float]:
    """The share of draws whose interval holds the truth, and of `null` draws of equal models those with p below 0.05."""
    monkeypatch.setattr(statistics, "N_RESAMPLES", resamples)
    rng = np.random.default_rng(n)
    teacher, student, length = (values.sum() for values in documents(rng, 1_000_000, 0.1))
    truth = perplexity(student, length) - perplexity(teacher, length)

    def difference(t: np.ndarray, s: np.ndarray, w: np.ndarray) -> np.ndarray:
        return perplexity(s, w) - perplexity(t, w)

    covered = 0
    for seed in range(draws):  # few resamples: the same ones each time would be one stroke of luck for all draws
        low, high, _ = statistics._studentised_interval(*documents(rng, n, 0.1), difference, seed=seed)
        covered += low <= truth <= high
    equal = [paired_aggregate(*documents(rng, n, 0.0), perplexity, seed=seed).p_value for seed in range(null)]
    return covered / draws, sum(p < 0.05 for p in equal) / max(null, 1)


def test_aggregates() -> None:
    found = paired_aggregate([-2.0, -4.0], [-3.0, -6.0], [1, 2], perplexity)
    assert (found.teacher, found.student) == (pytest.approx(math.exp(2)), pytest.approx(math.exp(3)))
    found = paired_aggregate([-2.0, -4.0], [-3.0, -5.0], [1, 2], bits_per_unit)
    assert found.difference == pytest.approx((8 - 6) / 3 / math.log(2))
    assert found.p_value == 0.5  # two documents cannot say more
    assert found.ci_low < 0 < found.ci_high


def test_all_documents_differ_alike() -> None:
    found = paired_aggregate([0.5] * 6, [0.25] * 6)
    assert (found.difference, found.ci_low, found.ci_high) == (-0.25, -0.25, -0.25)
    assert found.p_value == pytest.approx(2 / 2**6)


def test_the_seed_decides_the_interval() -> None:
    data = documents(np.random.default_rng(0), 20, 0.1)
    first, again = (paired_aggregate(*data, perplexity, seed=1) for _ in range(2))
    assert first == again
    assert paired_aggregate(*data, perplexity, seed=2).ci_low != first.ci_low


def test_holm_known_values() -> None:
    # Checked by hand: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then kept from falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_proportions([1, 0], [1]), "samples = "),
        (lambda: paired_proportions([], []), "samples = "),
        (lambda: paired_proportions([0.5, 1], [1, 1]), "right or wrong"),
        (lambda: paired_aggregate([1.0], [2.0]), "samples = 1.*at least 2"),
        (lambda: paired_aggregate([1.0, 2.0], [2.0, 1.0], [1.0, 0.0]), "positive weights"),
    ],
)
def test_unusable_samples(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [3, 8])
def test_a_student_that_diverged_is_inferior(value: float, n: int) -> None:
    teacher, student = np.linspace(-9, -8, n), np.linspace(-9, -8.5, n)
    student[1] = value
    found = paired_aggregate(teacher, student, np.full(n, 4.0), perplexity)
    assert math.isnan(found.ci_low)
    assert math.isnan(found.ci_high)
    assert found.p_value == 0
    assert non_inferiority(found.ci_low, found.ci_high, 1.0, True) == "inferior"
    assert non_inferiority(found.ci_low, found.ci_high, 1.0, False) == "inferior"
    assert paired_aggregate(student, teacher, np.full(n, 4.0), perplexity).p_value == 1
