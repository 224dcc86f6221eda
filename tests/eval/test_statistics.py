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
    holm,
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


@pytest.mark.parametrize("n", [50, 200])
def test_tango_coverage_and_mcnemar_level(n: int) -> None:
    rng = np.random.default_rng(n)
    for gained, lost in ((0.05, 0.10), (0.08, 0.08), (0.02, 0.2)):
        draws = rng.multinomial(n, (gained, lost, 1 - gained - lost), size=2000)
        limits = {(g, b): tango_interval(g, b, n) for g, b in {(int(g), int(b)) for g, b, _ in draws}}
        covered = np.mean([limits[g, b][0] <= gained - lost <= limits[g, b][1] for g, b, _ in draws])
        assert 0.935 < covered < 0.975, (gained, lost)
        if gained == lost:
            p = {(g, b): stats.binomtest(g, g + b).pvalue if g + b else 1 for g, b in limits}
            assert np.mean([p[g, b] < 0.05 for g, b, _ in draws]) <= 0.05


def documents(rng: np.random.Generator, n: int, harm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihoods of teacher and student and lengths; documents differ far more than the models do."""
    length = rng.lognormal(6, 0.3, n)
    nats, noise = rng.normal(2.0, 0.4, n), rng.normal(0, 0.05, n)
    return -length * nats, -length * (nats + harm + noise), length


@pytest.mark.parametrize("n", [6, 30])
def test_bootstrap_coverage_and_permutation_level(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "N_RESAMPLES", 999)
    rng = np.random.default_rng(n)
    teacher, student, length = (values.sum() for values in documents(rng, 1_000_000, 0.1))
    truth = perplexity(student, length) - perplexity(teacher, length)
    found = [paired_aggregate(*documents(rng, n, 0.1), perplexity) for _ in range(300)]
    assert 0.90 < np.mean([f.ci_low <= truth <= f.ci_high for f in found]) < 0.985
    null = [paired_aggregate(*documents(rng, n, 0.0), perplexity).p_value for _ in range(300)]
    assert np.mean([p < 0.05 for p in null]) < 0.085


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
