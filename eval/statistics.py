"""Paired differences student - teacher with 95% intervals and p-values.

Both models answer the same samples, so only the samples on which they differ say anything: unpaired tests (such as
lm-eval's own) throw that away and are far too wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from pl_attnedit.errors import invalid

CONFIDENCE = 0.95
POWER = 0.8
N_RESAMPLES = 9_999
BATCH = 500  # resamples at a time, to bound the memory
SEED = 0

Floats = NDArray[np.float64]
# (sums of the values, sums of the weights) -> the metric; works elementwise.
Aggregate = Callable[[Floats, Floats], Floats]
Verdict = Literal["non-inferior", "inferior", "inconclusive"]


@dataclass(frozen=True)
class Difference:
    """student - teacher over `n` paired samples; the interval has 95% confidence, the p-value is two-sided.

    `mde` is the minimum detectable effect: the true difference that so many samples of this kind find with a power of
    80% at the two-sided 5% level. None where the samples cannot tell: too few, or scores that never differ.
    """

    n: int
    teacher: float
    student: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    mde: float | None = field(default=None, kw_only=True)


def non_inferiority(low: float, high: float, margin: float, higher_is_better: bool) -> Verdict:
    """Whether the student lost less than `margin`, given the 95% interval of student - teacher.

    One-sided at 97.5%: "non-inferior" where the whole interval is better than a loss of `margin`, "inferior" where the
    whole interval is worse. Without an interval, of a student that diverged, "inferior".
    """
    if margin <= 0:
        raise invalid("margin", margin, "must be positive, in the unit of the metric")
    if not higher_is_better:
        low, high = -high, -low
    return "non-inferior" if low > -margin else "inferior" if not high >= -margin else "inconclusive"


def paired_proportions(teacher: ArrayLike, student: ArrayLike) -> Difference:
    """Compare two accuracies on the same questions (0 or 1 each).

    The interval is Tango's score interval (Statistics in Medicine 17, 1998), the p-value McNemar's exact one. Models
    that answer alike everywhere differ by exactly 0 with p = 1; the interval then shows what n answers cannot exclude.
    """
    t, s = _pairs(teacher, student)
    if not np.isin(np.concatenate([t, s]), (0, 1)).all():
        raise invalid("samples", "values other than 0 and 1", "paired proportions need right or wrong answers")
    gained, lost, n = int(((s == 1) & (t == 0)).sum()), int(((s == 0) & (t == 1)).sum()), len(t)
    low, high = tango_interval(gained, lost, n)
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    mde = detectable_proportions(gained, lost, n)
    return Difference(n, float(t.mean()), float(s.mean()), (gained - lost) / n, low, high, float(p), mde=mde)


def tango_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Score interval of (gained - lost) / n, where `gained` and `lost` count the discordant ones of `n` pairs."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    estimate = (gained - lost) / n

    def score(delta: float) -> float:
        # Restricted maximum likelihood estimate of the probability of a loss, given the difference delta.
        b = -(gained + lost) + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        distance = gained - lost - n * delta
        if distance == 0:
            return 0.0
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(1e6, distance)

    # The score falls from large at -1 to 0 at the estimate and on to very negative at 1.
    low = optimize.brentq(lambda delta: score(delta) - z, -1.0, estimate) if estimate > -1 else -1.0
    high = optimize.brentq(lambda delta: score(delta) + z, estimate, 1.0) if estimate < 1 else 1.0
    return low, high


def detectable_proportions(gained: int, lost: int, n: int, power: float = POWER) -> float | None:
    """The difference of two accuracies that McNemar's exact test finds with this power; None if n finds none.

    How often the models differ is taken from the sample, with half a pair added to each of the four cells (Agresti and
    Min, Biostatistics 6, 2005), since models that never differed in n pairs may still do so; a difference needs at
    least as many pairs that differ.
    """
    discordance = (gained + lost + 1) / (n + 2)

    def missing(delta: float) -> float:
        return mcnemar_power(delta, max(discordance, delta), n) - power

    return float(optimize.brentq(missing, 1e-9, 1.0, xtol=1e-6)) if missing(1.0) >= 0 else None


def mcnemar_power(delta: float, discordance: float, n: int) -> float:
    """Power of McNemar's exact test at the two-sided 5% level for a true difference `delta` where two models differ on a
    share `discordance` of n pairs."""
    pairs = np.arange(1, n + 1)
    weight = stats.binom.pmf(pairs, n, discordance)
    pairs, weight = pairs[weight > 1e-12], weight[weight > 1e-12]
    half = (1 - CONFIDENCE) / 2
    # The test rejects where at most `critical` of the pairs that differ are of the rarer kind.
    critical = stats.binom.ppf(half, pairs, 0.5)
    critical -= stats.binom.cdf(critical, pairs, 0.5) > half
    worse = (1 + delta / discordance) / 2
    rejected = stats.binom.cdf(critical, pairs, worse) + stats.binom.sf(pairs - critical - 1, pairs, worse)
    return float((weight * rejected).sum())


def paired_aggregate(
    teacher: ArrayLike,
    student: ArrayLike,
    weights: ArrayLike | None = None,
    aggregate: Aggregate = lambda total, weight: total / weight,
    *,
    seed: int = SEED,
) -> Difference:
    """Compare two metrics of the form ``aggregate(sum of values, sum of weights)``, perplexities for example.

    `teacher` and `student` hold one value per document, `weights` its length. Interval: paired studentised bootstrap
    over the documents (Efron and Tibshirani, 1993, chapter 12); the plain percentile and the BCa bootstrap cover only
    87% with eight documents. p-value: the two models' values swapped at random within documents (all 2^n ways where
    they are few). A model against itself gives exactly 0, the interval [0, 0] and p = 1.
    """
    t, s = _pairs(teacher, student)
    w = np.ones_like(t) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != t.shape or not (w > 0).all():
        raise invalid("weights", w.shape, f"need {len(t)} positive weights, one per sample")

    def difference(teacher_sum: Floats, student_sum: Floats, weight: Floats) -> Floats:
        return aggregate(student_sum, weight) - aggregate(teacher_sum, weight)

    total = w.sum()
    point = float(difference(t.sum(), s.sum(), total))
    values = (len(t), float(aggregate(t.sum(), total)), float(aggregate(s.sum(), total)), point)
    if np.array_equal(t, s):
        return Difference(*values, 0.0, 0.0, 1.0)
    finite = [np.isfinite(each).all() and np.isfinite(value) for each, value in zip((t, s), values[1:3])]
    if not all(finite):  # a student that diverged is worse without a test
        return Difference(*values, math.nan, math.nan, 0.0 if finite[0] else 1.0)
    if len(t) < 2:
        raise invalid("samples", len(t), "an interval needs at least 2 documents")
    low, high, error = _studentised_interval(t, s, w, difference, seed)
    mde = error * float(stats.t.ppf([(1 + CONFIDENCE) / 2, POWER], len(t) - 1).sum()) or None
    p = stats.permutation_test(
        (t, s),
        lambda t, s, axis: difference(t.sum(axis), s.sum(axis), total),
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=BATCH,
        rng=seed,
    ).pvalue
    return Difference(*values, low, high, float(p), mde=mde)


def _studentised_interval(
    t: Floats, s: Floats, w: Floats, difference: Callable[[Floats, Floats, Floats], Floats], seed: int
) -> tuple[float, float, float]:
    """Bootstrap-t interval whose standard errors are jackknife estimates; Student's t below five documents. Also the
    standard error of the difference."""
    n = len(t)

    def estimate(index_RN: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Differences and their standard errors for R resamples of N documents."""
        t_RN, s_RN, w_RN = t[index_RN], s[index_RN], w[index_RN]
        sums = [values.sum(-1, keepdims=True) for values in (t_RN, s_RN, w_RN)]
        without_one_RN = difference(sums[0] - t_RN, sums[1] - s_RN, sums[2] - w_RN)
        return difference(*sums)[..., 0], without_one_RN.std(-1) * math.sqrt(n - 1)

    point, error = estimate(np.arange(n))
    if error <= 1e-12 * abs(point):  # all documents differ by the same amount
        return float(point), float(point), 0.0
    if n < 5:  # too few different resamples
        quantiles = stats.t.ppf([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], n - 1)
    else:
        rng = np.random.default_rng(seed)
        deviations = []
        for start in range(0, N_RESAMPLES, BATCH):
            centre, spread = estimate(rng.integers(0, n, (min(BATCH, N_RESAMPLES - start), n)))
            usable = spread > 1e-9 * error  # not n times the same document
            deviations.append((centre[usable] - point) / spread[usable])
        quantiles = np.quantile(np.concatenate(deviations), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(point - quantiles[1] * error), float(point - quantiles[0] * error), float(error)


def perplexity(log_likelihood: Floats, length: Floats) -> Floats:
    """exp of the mean negative log-likelihood per unit of length (word, byte)."""
    return np.exp(-log_likelihood / length)


def bits_per_unit(log_likelihood: Floats, length: Floats) -> Floats:
    """Mean negative log-likelihood per unit of length, in bits."""
    return -log_likelihood / length / math.log(2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: below alpha means significant with the whole family at alpha."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _pairs(teacher: ArrayLike, student: ArrayLike) -> tuple[Floats, Floats]:
    t, s = np.asarray(teacher, dtype=np.float64), np.asarray(student, dtype=np.float64)
    if t.ndim != 1 or t.shape != s.shape or len(t) == 0:
        raise invalid(
            "samples", (t.shape, s.shape), "need the same number (at least 1) of teacher's and student's values"
        )
    return t, s
