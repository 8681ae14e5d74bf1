"""Intervals and tests against their definitions in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from distill.report.statistics import (
    bootstrap_over_seeds,
    equivalence,
    holm,
    in_words,
    mcnemar,
    over_seeds,
    p_text,
    paired,
    sign_flip,
    wilson,
)
from tests.formulas import p_of_flipped_signs


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


def rights(only_a: int, only_b: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.zeros(samples, bool), np.zeros(samples, bool)
    a[:only_a] = b[only_a : only_a + only_b] = True
    a[only_a + only_b : samples // 2] = b[only_a + only_b : samples // 2] = True
    return a, b


COUNTS = [(30, 12, 400), (0, 9, 100), (500, 460, 10_000), (4, 4, 60)]


@pytest.mark.parametrize(("only_a", "only_b", "samples"), COUNTS)
def test_the_interval_is_that_of_resampled_images(only_a: int, only_b: int, samples: int) -> None:
    a, b = rights(only_a, only_b, samples)
    test = mcnemar("a", "b", a, b)
    theirs = stats.bootstrap(
        (a.astype(float) - b,), np.mean, method="percentile", n_resamples=4000, batch=500, rng=np.random.default_rng(1)
    ).confidence_interval
    close = 6 * (theirs.high - theirs.low) + 100 / samples  # and one image, the step of a resampled accuracy
    assert test.low == pytest.approx(100 * theirs.low, abs=close)
    assert test.high == pytest.approx(100 * theirs.high, abs=close)
    assert test.low <= test.points <= test.high


def test_the_interval_over_seeds_is_wider_by_what_seeds_differ() -> None:
    apart = [rights(60, 10, 1000), rights(30, 30, 1000), rights(90, 20, 1000)]
    alike = [rights(60, 20, 1000)] * 3
    for pairs in (apart, alike):
        chance, means = np.random.default_rng(3), []
        for _ in range(2000):  # the same by drawing images, one by one, and then seeds
            images = chance.integers(0, 1000, 1000)
            drawn = [
                100 * (pairs[seed][0][images].mean() - pairs[seed][1][images].mean())
                for seed in chance.integers(0, 3, 3)
            ]
            means.append(np.mean(drawn))
        expected = np.quantile(means, [0.1, 0.9])  # not where a few draws of three seeds decide
        assert bootstrap_over_seeds(pairs, 0.8) == pytest.approx(expected, abs=0.25)
    (low, high), (lower, higher) = bootstrap_over_seeds(alike), bootstrap_over_seeds(apart)
    assert higher - lower > 1.5 * (high - low)


def test_the_same_networks_named_as_three_seeds_show_no_more_than_once() -> None:
    pair = rights(60, 35, 1000)
    once, thrice = mcnemar("a", "b", *pair), over_seeds([pair] * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=0.15)
    assert thrice.p == pytest.approx(once.p, rel=1e-9)
    assert thrice.points == pytest.approx(once.points)


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_flip_test_is_exact(seed: int) -> None:
    chance = np.random.default_rng(seed)
    differences = chance.integers(-4, 5, 40)
    assert sign_flip(differences) == pytest.approx(p_of_flipped_signs(differences.tolist()), rel=1e-9)
    a, b = (chance.random(200) < 0.6 for _ in range(2))
    assert sign_flip(a.astype(int) - b) == pytest.approx(mcnemar("a", "b", a, b).p, rel=1e-9)
    assert sign_flip(np.zeros(5, np.int64)) == 1.0


def test_equally_good_students_of_several_seeds_are_rarely_told_apart() -> None:
    """The images that are hard are hard under all seeds; the other model is one for all of them, as a teacher is."""
    chance, found = np.random.default_rng(0), []
    for _ in range(200):
        easy = chance.beta(4, 1, 1000)
        teacher = chance.random(1000) < easy
        test = over_seeds([(chance.random(1000) < easy, teacher) for _ in range(3)])
        found.append((test.low > 0 or test.high < 0, test.p < 0.05))
    assert np.mean(found, 0).max() < 0.09


def test_words_over_seeds_follow_the_interval() -> None:
    assert over_seeds([rights(90, 20, 1000)] * 3).words.startswith("better by 7.00 points (95 % interval +")
    assert over_seeds([rights(30, 30, 20_000)] * 3).words.startswith(
        "equal within 1 point (+0.00 points, 95 % interval -"
    )
    open_words = over_seeds([rights(30, 28, 1000)] * 3).words
    assert open_words.startswith("no difference shown (+0.20 points")
    assert "often be missed" in open_words


@pytest.mark.parametrize(("only_a", "only_b", "samples"), COUNTS)
@pytest.mark.parametrize("margin", [0.5, 1.0, 5.0])
def test_equivalence_is_two_one_sided_tests(only_a: int, only_b: int, samples: int, margin: float) -> None:
    a, b = rights(only_a, only_b, samples)
    differences = a.astype(float) - b
    both = [
        stats.ttest_1samp(differences, bound, alternative=side).pvalue
        for bound, side in ((-margin / 100, "greater"), (margin / 100, "less"))
    ]
    assert equivalence(only_a, only_b, samples, margin) == pytest.approx(max(both), rel=1e-9)
    p, *_ = DescrStatsW(differences).ttost_mean(-margin / 100, margin / 100)
    assert equivalence(only_a, only_b, samples, margin) == pytest.approx(p, rel=1e-9)


def test_equal_models_are_equal() -> None:
    assert equivalence(0, 0, 50, 1.0) == 0.0
    assert equivalence(50, 0, 50, 1.0) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_holm(seed: int) -> None:
    ps = np.random.default_rng(seed).uniform(0, 0.2, 7).tolist()
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1].tolist(), rel=1e-12)
    assert holm([]) == []


def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    """In simulated test sets in which as many images are decided otherwise, and the difference is that one."""
    samples, differ = 4000, 400
    smallest = mcnemar("a", "b", *rights(differ // 2, differ // 2, samples)).smallest
    share = (1 + smallest / 100 * samples / differ) / 2
    chance = np.random.default_rng(0)
    only_a = chance.binomial(differ, share, 1000)
    found = np.mean([stats.binomtest(int(k), differ).pvalue < 0.05 for k in only_a])
    assert found == pytest.approx(0.8, abs=0.04)


INTERVAL = "95 % interval -0.50 to +0.75"


@pytest.mark.parametrize(
    ("points", "p", "p_equal", "words"),
    [
        (1.8, 0.0001, 0.9, f"better by 1.80 points ({INTERVAL}), p < 0.001"),
        (-1.8, 0.012, 0.9, f"worse by 1.80 points ({INTERVAL}), p = 0.012"),
        (0.2, 0.43, 0.3,
         f"no difference shown (+0.20 points, {INTERVAL}, p = 0.43; one below 1.50 points would often be missed)"),
        (0.3, 0.05, 0.05,
         f"no difference shown (+0.30 points, {INTERVAL}, p = 0.05; one below 1.50 points would often be missed)"),
        (0.2, 0.43, 0.01, f"equal within 1 point (+0.20 points, {INTERVAL}; TOST p = 0.01)"),
    ],
)  # fmt: skip
def test_results_in_words(points: float, p: float, p_equal: float, words: str) -> None:
    assert in_words(points, p, (-0.5, 0.75), 1.5, p_equal) == words


def test_p_is_not_rounded_across_the_line() -> None:
    assert p_text(0.0496) == "p = 0.0496"
    assert p_text(1.0) == "p = 1"
