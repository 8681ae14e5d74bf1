"""Attention transfer against loops over samples, positions and channels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distill.methods.attention_transfer import attention_transfer
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    value_and_gradient,
)


def attention(maps, power):
    """[C, h, w] -> h w numbers."""
    channels, height, width = maps.shape
    sums = [
        sum(abs(maps[channel, y, x]) ** power for channel in range(channels)) / channels
        for y in range(height)
        for x in range(width)
    ]
    length = sum(value**2 for value in sums) ** 0.5
    return [value / length for value in sums]


def means(maps, height, width):
    """[C, H, W] -> [C, height, width], where H and W are multiples."""
    high, wide = maps.shape[1] // height, maps.shape[2] // width
    return torch.tensor(
        [
            [
                [
                    sum(channel[y * high + i][x * wide + j] for i in range(high) for j in range(wide)) / (high * wide)
                    for x in range(width)
                ]
                for y in range(height)
            ]
            for channel in maps.tolist()
        ],
        dtype=torch.float64,
    )


def oracle(student, teacher, power):
    squares = []
    for s, t in zip(student, teacher, strict=True):
        q, p = attention(s, power), attention(means(t, *s.shape[1:]), power)
        squares += [(a - b) ** 2 for a, b in zip(q, p, strict=True)]
    return sum(squares) / len(squares)


@pytest.mark.parametrize("power", [1.0, 2, 3.0, 4.5])
@pytest.mark.parametrize("size", [(2, 3), (4, 6)], ids=["same", "larger"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_its_formula(power, size, batch):
    student, teacher = normal(0, batch, 3, 2, 3, scale=5), normal(1, batch, 4, *size)
    options = {"power": power}
    # The teacher's map is resized in float32.
    assert_equals_oracle(
        partial(attention_transfer, **options), partial(oracle, **options), student, teacher, tolerance=3e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.0, 4.0), st.floats(-6, 6))
def test_its_range_and_what_does_not_matter(seed, power, exponent):
    student, teacher = normal(seed, 3, 4, 3, 3).float(), normal(seed + 1, 3, 5, 6, 6).float()
    generator = torch.Generator().manual_seed(seed)
    order, channels = torch.randperm(3, generator=generator), torch.randperm(4, generator=generator)
    loss = attention_transfer(student, teacher, power)
    assert 0 <= loss.item() <= 2 / 9
    factors = torch.tensor([1.0, -1.0, 10**exponent]).view(3, 1, 1, 1)
    for same in [
        attention_transfer(student * factors, teacher / factors, power),
        attention_transfer(student[order], teacher[order], power),
        attention_transfer(student[:, channels], teacher, power),
    ]:
        torch.testing.assert_close(same, loss)
    twice = torch.cat([student, -student], dim=1) * factors
    assert attention_transfer(student, twice, power).item() == pytest.approx(0, abs=1e-12)
    assert attention_transfer(student, F.interpolate(twice, scale_factor=2), power).item() == pytest.approx(
        0, abs=1e-12
    )


def test_a_smaller_map_of_the_teacher_is_enlarged():
    student, teacher = normal(0, 2, 3, 4, 4).float(), normal(1, 2, 5, 1, 1).float()
    everywhere = torch.ones(2, 1, 4, 4)
    torch.testing.assert_close(attention_transfer(student, teacher, 2), attention_transfer(student, everywhere, 2))


@pytest.mark.parametrize("power", [1, 2, 4, 8])
def test_half_precision_does_not_overflow(power):
    loss = partial(attention_transfer, power=power)
    assert_half_is_computed_in_float32(loss, normal(0, 2, 3, 4, 4, scale=1e4), normal(1, 2, 5, 8, 8, scale=1e4))


@pytest.mark.parametrize("power", [1, 2, 4])
def test_a_map_of_zeros_is_finite(power):
    student = normal(0, 2, 3, 4, 4).float()
    student[0] = 0
    for teacher in (normal(1, 2, 3, 4, 4).float(), torch.zeros(2, 3, 4, 4)):
        value, gradient = value_and_gradient(partial(attention_transfer, power=power), student, teacher)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
