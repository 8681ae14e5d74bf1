"""How sure the figures are: intervals of counts, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SIGNIFICANT = 0.05
POWER = 0.8
EQUAL = 1.0
"""Points of accuracy within which two models count as equal."""
RESAMPLES = 10_000
Right = NDArray[np.bool_]


class PairedTest(NamedTuple):
    """One model against another on the same images."""

    first: str
    second: str
    points: float
    """Accuracy of the first minus that of the second, in percentage points."""
    only_first_right: int
    """Images that the first alone has right."""
    only_second_right: int
    p: float
    """Of McNemar's exact test: the chance of such a difference, or a larger one, between equals."""
    low: float
    high: float
    """95 % interval of `points`: paired bootstrap over the images."""
    smallest: float
    """Points that McNemar's test would find in 80 % of such test sets, with as many images on which the two differ."""
    p_equal: float
    """Of the two one-sided t-tests: the chance of such a small difference between models that are `EQUAL` points apart
    (Schuirmann 1987)."""
    words: str


def wilson(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927)."""
    interval = stats.binomtest(correct, samples).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mcnemar(first: str, second: str, first_right: Right, second_right: Right) -> PairedTest:
    """McNemar's exact test (two-sided, binomial) of two models' right answers, bool [N] on the same images."""
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    return mcnemar_of_counts(first, second, only_first, only_second, len(first_right))


def mcnemar_of_counts(first: str, second: str, only_first: int, only_second: int, samples: int) -> PairedTest:
    """As `mcnemar`, from the numbers of images that only one of the two has right."""
    points = 100 * (only_first - only_second) / samples
    p = float(stats.binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0
    low, high = bootstrap(only_first, only_second, samples)
    deviation = 100 * (only_first + only_second) ** 0.5 / samples  # of a difference between equals
    smallest = float(sum(stats.norm.isf([SIGNIFICANT / 2, 1 - POWER]))) * deviation
    p_equal = equivalence(only_first, only_second, samples, EQUAL)
    words = in_words(points, p, (low, high), smallest, p_equal)
    return PairedTest(first, second, points, only_first, only_second, p, low, high, smallest, p_equal, words)


def bootstrap(only_first: int, only_second: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval, in points, of the difference of two accuracies, by a paired bootstrap over the images (Efron
    1979): a resampled set of images has multinomial counts of those that only one model has right.
    """
    shares = np.array([only_first, only_second, samples - only_first - only_second]) / samples
    drawn = np.random.default_rng(0).multinomial(samples, shares, size=RESAMPLES)
    low, high = np.quantile(drawn[:, 0] - drawn[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return 100 * float(low) / samples, 100 * float(high) / samples


def bootstrap_over_seeds(pairs: Sequence[tuple[Right, Right]], confidence: float = 0.95) -> tuple[float, float]:
    """As `bootstrap`, for the mean over seeds, each with the right answers of both models: seeds are drawn, and images
    within each of them.
    """
    generator = np.random.default_rng(0)
    samples = len(pairs[0][0])
    only = np.array([[(a & ~b).sum(), (b & ~a).sum()] for a, b in pairs])
    shares = np.column_stack([only, samples - only.sum(1)]) / samples
    chosen = generator.integers(0, len(pairs), (RESAMPLES, len(pairs)))
    drawn = generator.multinomial(samples, shares[chosen])
    means = (drawn[..., 0] - drawn[..., 1]).mean(1) / samples
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return 100 * float(low), 100 * float(high)


def equivalence(only_first: int, only_second: int, samples: int, margin: float) -> float:
    """p of the two one-sided paired t-tests that two models are less than `margin` points apart (Schuirmann 1987)."""
    mean = (only_first - only_second) / samples
    spread = ((only_first + only_second) / samples - mean**2) / max(1, samples - 1)
    if spread <= 0:
        return 0.0 if abs(mean) < margin / 100 else 1.0
    return float(stats.t.sf((margin / 100 - abs(mean)) / spread**0.5, samples - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the same order."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate((len(ps) - np.arange(len(ps))) * np.asarray(ps)[order])
    found = np.empty(len(ps))
    found[order] = np.minimum(adjusted, 1)
    return found.tolist()


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of the paired t-test, two-sided, of two models' accuracies (percent), one pair a seed, at least two; None where
    the differences are all the same.
    """
    # Equal differences have no spread to measure their mean by; rounding must not make one up.
    same = np.ptp(np.subtract(a, b)) < 1e-9
    return None if same else float(stats.ttest_rel(a, b).pvalue)


def in_words(points: float, p: float, interval: tuple[float, float], smallest: float, p_equal: float) -> str:
    """'better by 1.80 points (95 % interval +1.20 to +2.40), p < 0.001', 'equal within 1 point (...)' where a test of
    equivalence shows it, or 'no difference shown (...; one below 1.50 points would often be missed)'.
    """
    between = f"95 % interval {interval[0]:+.2f} to {interval[1]:+.2f}"
    if p < SIGNIFICANT:
        return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points ({between}), {p_text(p)}"
    if p_equal < SIGNIFICANT:
        return f"equal within {EQUAL:g} point ({points:+.2f} points, {between}; TOST {p_text(p_equal)})"
    return (
        f"no difference shown ({points:+.2f} points, {between}, {p_text(p)}; one below {smallest:.2f} points would "
        "often be missed)"
    )


def p_text(p: float) -> str:
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"
