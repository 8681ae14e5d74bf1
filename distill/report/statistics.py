"""How sure the figures are: intervals of counts, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SIGNIFICANT = 0.05
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
    words: str


def wilson(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927)."""
    interval = stats.binomtest(correct, samples).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mcnemar(first: str, second: str, first_right: Right, second_right: Right) -> PairedTest:
    """McNemar's exact test (two-sided, binomial) of two models' right answers, bool [N] on the same images."""
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    points = 100 * (only_first - only_second) / len(first_right)
    p = float(stats.binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0
    return PairedTest(first, second, points, only_first, only_second, p, in_words(points, p))


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of the paired t-test, two-sided, of two models' accuracies (percent), one pair a seed, at least two; None where
    the differences are all the same.
    """
    # Equal differences have no spread to measure their mean by; rounding must not make one up.
    same = np.ptp(np.subtract(a, b)) < 1e-9
    return None if same else float(stats.ttest_rel(a, b).pvalue)


def in_words(points: float, p: float) -> str:
    """'better by 1.80 points, p < 0.001' or 'no difference shown (+0.20 points, p = 0.41)'."""
    if p >= SIGNIFICANT:
        return f"no difference shown ({points:+.2f} points, {p_text(p)})"
    return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points, {p_text(p)}"


def p_text(p: float) -> str:
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"
