"""DIST against Pearson correlations in loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.methods.dist import dist
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    softmax,
    value_and_gradient,
)


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    variances = [sum((x - mean) ** 2 for x in values) for values, mean in ((a, mean_a), (b, mean_b))]
    return covariance / ((variances[0] * variances[1]).sqrt() + 1e-8)


def oracle(student, teacher, inter, intra, temperature):
    s = [softmax(row / temperature) for row in student]
    t = [softmax(row / temperature) for row in teacher]
    loss = sum(inter * (1 - pearson(a, b)) for a, b in zip(s, t, strict=True)) / len(s)
    if len(s) == 1:
        return (loss + intra) * temperature**2
    columns = list(zip(zip(*s, strict=True), zip(*t, strict=True), strict=True))
    loss = loss + sum(intra * (1 - pearson(a, b)) for a, b in columns) / len(columns)
    return loss * temperature**2


@pytest.mark.parametrize(
    ("inter", "intra", "temperature"), [(2.0, 1.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1, 2, 0.5)]
)
def test_it_is_its_formula(inter, intra, temperature):
    options = {"inter": inter, "intra": intra, "temperature": temperature}
    student, teacher = normal(0, 5, 4, scale=2), normal(1, 5, 4, scale=2)
    assert_equals_oracle(partial(dist, **options), partial(oracle, **options), student, teacher)


def test_a_batch_of_one_has_a_constant_for_its_classes():
    student, teacher = normal(0, 1, 4), normal(1, 1, 4)
    options = {"inter": 1.5, "intra": 2.0, "temperature": 3.0}
    assert_equals_oracle(partial(dist, **options), partial(oracle, **options), student, teacher)
    value, gradient = value_and_gradient(partial(dist, inter=0.0, intra=2.0, temperature=3.0), student, teacher)
    assert value.item() == 2.0 * 3.0**2
    assert (gradient == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 4.0), st.floats(1.0, 30.0), st.floats(-50.0, 50.0))
def test_its_range_zero_when_identical_and_no_offset_matters(seed, temperature, scale, offset):
    student, teacher = normal(seed, 6, 5, scale=scale), normal(seed + 1, 6, 5, scale=scale)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    loss = dist(student, teacher, 1.0, 2.0, temperature)
    assert 0 <= loss.item() <= 2 * temperature**2 * 3
    torch.testing.assert_close(dist(student + offset, teacher - offset, 1.0, 2.0, temperature), loss)
    torch.testing.assert_close(dist(student[order], teacher[order], 1.0, 2.0, temperature), loss)
    assert 0 <= dist(student, student + offset, 1.0, 0.0, temperature).item() < 1e-3


def test_only_the_proportions_within_a_sample_matter():
    """A student half as far from even chances, q = (p + 1/4) / 2, correlates perfectly with its teacher."""
    teacher = normal(0, 5, 4)
    student = ((teacher.softmax(1) + 1 / 4) / 2).log()
    assert dist(student, teacher, 1.0, 1.0, 1.0).item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(
        dist(student, normal(1, 5, 4), 1.0, 1.0, 1.0), dist(teacher, normal(1, 5, 4), 1.0, 1.0, 1.0), rtol=0, atol=1e-5
    )


def test_half_precision_is_computed_in_float32():
    loss = partial(dist, inter=1.0, intra=1.0, temperature=1.0)
    assert_half_is_computed_in_float32(loss, normal(0, 4, 10, scale=1000), normal(1, 4, 10, scale=1000))


def test_equal_logits_are_finite():
    loss = partial(dist, inter=1.0, intra=1.0, temperature=1.0)
    for student, teacher in [(torch.zeros(4, 8), normal(0, 4, 8).float()), (torch.zeros(4, 8), torch.zeros(4, 8))]:
        value, gradient = value_and_gradient(loss, student, teacher)
        assert value.isfinite()
        assert gradient.isfinite().all()
