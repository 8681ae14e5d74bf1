"""Logit standardisation of soft distillation, against its formula in loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.methods.soft import soft
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    softmax,
    value_and_gradient,
)


def z_scores(row):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / (len(row) - 1)
    return torch.stack([(value - mean) / (variance.sqrt() + 1e-7) for value in row])


def oracle(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = softmax(z_scores(t) / temperature)
        q = softmax(z_scores(s) / temperature)
        total = total + sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
    return total * temperature**2 / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("batch", [1, 5])
def test_it_is_its_formula(temperature, batch):
    assert_equals_oracle(
        partial(soft, temperature=temperature, standardize=True),
        partial(oracle, temperature=temperature),
        normal(0, batch, 6, scale=3),
        normal(1, batch, 6, scale=0.5) + 7,
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 20.0), st.floats(0.1, 50.0), st.floats(-50.0, 50.0))
def test_neither_range_nor_offset_of_the_logits_matters(seed, temperature, factor, offset):
    student, teacher = normal(seed, 4, 10).float(), normal(seed + 1, 4, 10).float()
    loss = soft(student, teacher, temperature, standardize=True)
    assert loss.item() >= -1e-4
    moved = soft(student * factor + offset, teacher, temperature, standardize=True)
    torch.testing.assert_close(moved, loss, rtol=1e-3, atol=1e-3)
    assert soft(student, student * factor + offset, temperature, standardize=True).item() == pytest.approx(0, abs=1e-3)


def test_without_it_the_range_matters():
    student, teacher = normal(0, 4, 10), normal(1, 4, 10)
    torch.testing.assert_close(soft(student, teacher, 2.0), soft(student, teacher, 2.0, standardize=False))
    assert abs(soft(student * 2, teacher, 2.0) - soft(student, teacher, 2.0)) > 0.1


@pytest.mark.parametrize("standardize", [False, True])
def test_half_precision_is_computed_in_float32(standardize):
    loss = partial(soft, temperature=1.0, standardize=standardize)
    assert_half_is_computed_in_float32(loss, normal(0, 4, 10, scale=1000), normal(1, 4, 10, scale=1000))


def test_equal_logits_are_finite():
    """As those of a head that starts from zero."""
    value, gradient = value_and_gradient(
        partial(soft, temperature=1.0, standardize=True), torch.zeros(3, 10), normal(0, 3, 10).float()
    )
    assert value.isfinite()
    assert gradient.isfinite().all()
