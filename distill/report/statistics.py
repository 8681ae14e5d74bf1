"""How sure the figures are: intervals of counts, and paired verdicts in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SIGNIFICANT = 0.05
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """One model against another on the same images."""

    a: str
    b: str
    points: float
    """Accuracy of a minus that of b, in percentage points."""
    only_a: int
    """Images that a alone has right."""
    only_b: int
    p: float
    """Of McNemar's exact test: the chance of such a difference, or a larger one, between equals."""

    @property
    def words(self) -> str:
        return in_words(self.points, self.p)


@dataclass(frozen=True)
class Paired:
    """Differences of two models over the same seeds."""

    points: float
    """Their mean."""
    p: float | None
    """Of the paired t-test, two-sided; None where the differences are all the same."""


def wilson(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (Wilson 1927)."""
    interval = stats.binomtest(correct, samples).proportion_ci(confidence, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mcnemar(a: str, b: str, a_right: Right, b_right: Right) -> Verdict:
    """McNemar's exact test (two-sided, binomial) of two models' right answers, bool [N] on the same images."""
    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return Verdict(a, b, 100 * (only_a - only_b) / len(a_right), only_a, only_b, p)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Accuracies (percent) of two models, one pair a seed, at least two."""
    differences = np.subtract(a, b)
    # Equal differences have no spread to measure the mean by; rounding must not make one up.
    same = np.ptp(differences) < 1e-9
    p = None if same else float(stats.ttest_rel(a, b).pvalue)
    return Paired(float(differences.mean()), p)


def in_words(points: float, p: float) -> str:
    """'better by 1.80 points, p < 0.001' or 'no difference shown (0.20 points, p = 0.41)'."""
    if p >= SIGNIFICANT:
        return f"no difference shown ({points:+.2f} points, {p_text(p)})"
    return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points, {p_text(p)}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3g}"
