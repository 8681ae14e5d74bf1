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


class OverSeeds(NamedTuple):
    """One model against another under the same seeds, on the same images."""

    points: float
    """Mean accuracy of the first minus that of the second, in percentage points."""
    p: float
    """Of `sign_flip`, where an image's answers under all seeds stay together: about other images, not other seeds."""
    low: float
    high: float
    """95 % interval of `points`: bootstrap over images and seeds."""
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


def over_seeds(pairs: Sequence[tuple[Right, Right]]) -> OverSeeds:
    """Two models under several seeds, each with the right answers of both, bool [N], on the same images."""
    apart = _apart(pairs)
    points = 100 * float(apart.mean())
    p = sign_flip(apart.sum(1))
    low, high = bootstrap_over_seeds(pairs)
    most = float(sum(stats.norm.isf([SIGNIFICANT / 2, 1 - POWER]))) / float(stats.norm.isf(SIGNIFICANT / 2))
    smallest = most * (high - low) / 2
    # By the interval, which knows of the seeds.
    is_apart, is_equal = (low > 0 or high < 0), max(-low, high) < EQUAL
    return OverSeeds(points, p, low, high, _words(points, p, (low, high), smallest, is_apart, is_equal))


def _apart(pairs: Sequence[tuple[Right, Right]]) -> NDArray[np.int64]:
    """[images, seeds]: 1 where only the first model is right, -1 where only the second is."""
    return np.stack([a.astype(np.int64) - b.astype(np.int64) for a, b in pairs], 1)


def bootstrap_over_seeds(pairs: Sequence[tuple[Right, Right]], confidence: float = 0.95) -> tuple[float, float]:
    """As `bootstrap`, for the mean over seeds, each with the right answers of both models: images are drawn, the same
    for all seeds, and seeds. What is by chance of the images does not become less with the number of seeds.
    """
    generator = np.random.default_rng(0)
    apart = _apart(pairs)
    samples, seeds = apart.shape
    kinds, counts = np.unique(apart, axis=0, return_counts=True)
    means = []
    for _ in range(0, RESAMPLES, RESAMPLES // 20):  # in parts: many seeds have many kinds of images
        images = generator.multinomial(samples, counts / samples, RESAMPLES // 20)
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES // 20)
        means.append(((images @ kinds) * chosen).sum(1) / samples / seeds)
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return 100 * float(low), 100 * float(high)


def sign_flip(differences: NDArray[np.int64]) -> float:
    """p, two-sided and exact, of the test that gives the difference of each image, a whole number, a random sign
    (Fisher 1935): the chance that their sum is so far from 0, or farther, if both models are equally good. For
    differences of -1, 0 and 1 it is McNemar's exact test.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of how much of the sizes is positive
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        positive = np.zeros(size * count + 1)
        positive[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, positive)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


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
    is_equal, equal = p_equal < SIGNIFICANT, f"; TOST {p_text(p_equal)}"
    return _words(points, p, interval, smallest, p < SIGNIFICANT, is_equal, equal)


def _words(
    points: float,
    p: float,
    interval: tuple[float, float],
    smallest: float,
    is_apart: bool,
    is_equal: bool,
    equal: str = "",
) -> str:
    """`equal`: what else is said of equal ones."""
    between = f"95 % interval {interval[0]:+.2f} to {interval[1]:+.2f}"
    if is_apart:
        return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points ({between}), {p_text(p)}"
    if is_equal:
        return f"equal within {EQUAL:g} point ({points:+.2f} points, {between}{equal})"
    return (
        f"no difference shown ({points:+.2f} points, {between}, {p_text(p)}; one below {smallest:.2f} points would "
        "often be missed)"
    )


def p_text(p: float) -> str:
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"
