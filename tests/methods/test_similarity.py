"""Gram matrices against loops over pairs of samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.methods.similarity import similarity
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    value_and_gradient,
)


def gram(maps):
    flat = [list(sample.flatten()) for sample in maps]
    rows = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in flat] for a in flat]
    return [[value / sum(other**2 for other in row) ** 0.5 for value in row] for row in rows]


def oracle(student, teacher):
    s, t = gram(student), gram(teacher)
    batch = range(len(s))
    return sum((s[i][j] - t[i][j]) ** 2 for i in batch for j in batch) / len(s) ** 2


@pytest.mark.parametrize("batch", [2, 4])
def test_it_is_its_formula(batch):
    assert_equals_oracle(similarity, oracle, normal(0, batch, 2, 2, 2, scale=3), normal(1, batch, 3, 1, 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_its_range_and_what_does_not_matter(seed, exponent):
    student, teacher = normal(seed, 5, 3, 2, 2), normal(seed + 1, 5, 4, 3, 3)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    loss = similarity(student, teacher)
    assert 0 <= loss.item() <= 4 / 5
    for same in [
        similarity(student * 10**exponent, teacher / 10**exponent),
        similarity(student[order], teacher[order]),
        similarity(-student.flip(2), teacher),
    ]:
        torch.testing.assert_close(same, loss)
    twice = torch.cat([student, student], dim=1) * 10**exponent
    assert similarity(student, twice).item() == pytest.approx(0, abs=1e-12)
    assert similarity(student, twice.flatten(2)[..., None]).item() == pytest.approx(0, abs=1e-12)


def test_the_largest_difference():
    """All alike to one, each other's opposite to the other."""
    student = torch.ones(2, 1, 1, 1)
    teacher = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert similarity(student, teacher).item() == pytest.approx(1)


def test_a_batch_of_one_is_zero():
    value, gradient = value_and_gradient(similarity, normal(0, 1, 3, 2, 2), normal(1, 1, 4, 2, 2))
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_a_map_of_zeros_is_like_no_other():
    student, teacher = normal(0, 4, 3, 2, 2).float(), normal(1, 4, 3, 2, 2).float()
    _, usual = value_and_gradient(similarity, student, teacher)
    student[1] = 0
    for some in (student, torch.zeros(4, 3, 2, 2)):
        value, gradient = value_and_gradient(similarity, some, teacher)
        assert 0 < value.item() <= 1
        assert gradient.abs().max() < 100 * usual.abs().max()


def test_half_precision_does_not_overflow():
    student, teacher = normal(0, 4, 3, 8, 8, scale=1e4), normal(1, 4, 64, 4, 4, scale=1e4)
    assert_half_is_computed_in_float32(similarity, student, teacher)
