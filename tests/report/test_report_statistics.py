"""Intervals and tests against their definitions in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import t as student_t

from distill.report.statistics import in_words, mcnemar, p_text, paired, wilson


@pytest.mark.parametrize(("correct", "samples"), [(0, 10), (10, 10), (7, 10), (9173, 10_000)])
def test_wilson_is_where_the_score_test_turns(correct: int, samples: int) -> None:
    z = 1.959963984540054
    for bound in wilson(correct, samples):
        p = bound / 100
        # At its bounds a share p is just z deviations of the binomial away from what was seen.
        assert abs(correct / samples - p) == pytest.approx(z * sqrt(p * (1 - p) / samples), abs=1e-7)
    low, high = wilson(correct, samples)
    assert 0 <= low <= 100 * correct / samples <= high <= 100


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 3), (3, 3), (0, 6), (12, 4), (40, 17)])
def test_mcnemar_is_the_exact_binomial(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 5 + [False] * 5)
    b = np.array([False] * only_a + [True] * only_b + [True] * 5 + [False] * 5)
    n = only_a + only_b
    as_rare = [comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, only_a)]
    result = mcnemar("a", "b", a, b)
    assert result.p == pytest.approx(float(Fraction(sum(as_rare), 2**n)), rel=1e-12)
    assert (result.only_first_right, result.only_second_right) == (only_a, only_b)
    assert result.points == pytest.approx(100 * (a.mean() - b.mean()))
    turned = mcnemar("b", "a", b, a)
    assert (turned.p, turned.points) == (result.p, -result.points)


def test_seeds_are_compared_in_pairs() -> None:
    a, b = [81.0, 82.5, 80.0, 84.0], [80.0, 81.0, 79.5, 82.0]
    differences = np.subtract(a, b)
    statistic = differences.mean() / (differences.std(ddof=1) / 2)
    assert paired(a, b) == pytest.approx(2 * student_t.sf(statistic, 3))
    # The same difference at every seed has no spread: nothing can be said of chance.
    assert paired([80.1, 81.1], [80.0, 81.0]) is None


@pytest.mark.parametrize(
    ("points", "p", "words"),
    [
        (1.8, 0.0001, "better by 1.80 points, p < 0.001"),
        (-1.8, 0.012, "worse by 1.80 points, p = 0.012"),
        (0.2, 0.43, "no difference shown (+0.20 points, p = 0.43)"),
        (0.3, 0.05, "no difference shown (+0.30 points, p = 0.05)"),
    ],
)
def test_results_in_words(points: float, p: float, words: str) -> None:
    assert in_words(points, p) == words


def test_p_is_not_rounded_across_the_line() -> None:
    assert p_text(0.0496) == "p = 0.0496"
    assert p_text(1.0) == "p = 1"
