"""Relations of pairs and triples against loops over them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.methods.relational import relational
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    value_and_gradient,
)


def huber(a, b):
    difference = abs(a - b)
    return difference**2 / 2 if difference < 1 else difference - 0.5


def embed(maps):
    _, channels, height, width = maps.shape
    return [[sum(sample[channel].flatten()) / (height * width) for channel in range(channels)] for sample in maps]


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def distances(points):
    """Of the pairs of two different samples, by their places."""
    pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j]
    found = {(i, j): dot(d := minus(points[i], points[j]), d) ** 0.5 for i, j in pairs}
    mean = sum(found.values()) / len(found)
    return {pair: value / mean for pair, value in found.items()}


def cosine(points, i, j, k):
    """Of the angle at j."""
    to_i, to_k = minus(points[i], points[j]), minus(points[k], points[j])
    return dot(to_i, to_k) / (dot(to_i, to_i) * dot(to_k, to_k)) ** 0.5


def oracle(student, teacher, distance, angle):
    s, t = embed(student), embed(teacher)
    batch = len(s)
    s_distances, t_distances = distances(s), distances(t)
    by_distance = sum(huber(s_distances[pair], t_distances[pair]) for pair in s_distances) / batch**2
    places = range(batch)
    triples = [(i, j, k) for i in places for j in places for k in places if i != j != k]
    by_angle = sum(huber(cosine(s, *triple), cosine(t, *triple)) for triple in triples) / batch**3
    return distance * by_distance + angle * by_angle


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("batch", [3, 5])
def test_it_is_its_formula(distance, angle, batch):
    student, teacher = normal(0, batch, 3, 2, 2), normal(1, batch, 4, 1, 3, scale=9)
    teacher[0] *= 4  # far: beyond the square part of the Huber loss
    options = {"distance": distance, "angle": angle}
    assert_equals_oracle(partial(relational, **options), partial(oracle, **options), student, teacher)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_only_relations_matter(seed, exponent):
    student, teacher = normal(seed, 5, 3, 2, 2), normal(seed + 1, 5, 4, 3, 3)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(5, generator=generator)
    rotation = torch.linalg.qr(normal(seed + 2, 3, 3))[0]
    moved = torch.einsum("bchw,cd->bdhw", student, rotation) * 10**exponent + normal(seed, 1, 3, 1, 1)
    loss = relational(student, teacher, 1.0, 2.0)
    assert loss.item() >= 0
    for same in [
        relational(moved, teacher, 1.0, 2.0),
        relational(student[order], teacher[order], 1.0, 2.0),
        relational(student.flip(3), teacher, 1.0, 2.0),
    ]:
        torch.testing.assert_close(same, loss)
    more_channels = torch.cat([moved, moved], dim=1).mean(dim=(2, 3), keepdim=True)
    assert relational(student, more_channels, 1.0, 2.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_than_three_samples_have_no_relations(batch):
    value, gradient = value_and_gradient(
        partial(relational, distance=1.0, angle=1.0), normal(0, batch, 3, 2, 2), normal(1, batch, 4, 2, 2)
    )
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_identical_samples_have_no_direction():
    """They are not parted by an arbitrary one, however large: their gradient is as that of the others."""
    student, teacher = normal(0, 5, 3, 2, 2).float(), normal(1, 5, 4, 2, 2).float()
    loss = partial(relational, distance=1.0, angle=1.0)
    _, usual = value_and_gradient(loss, student, teacher)
    student[1] = student[0]
    for some in (student, student[:1].expand(5, -1, -1, -1), torch.zeros(5, 3, 2, 2)):
        value, gradient = value_and_gradient(loss, some, teacher)
        assert 0 < value.item() < 5
        assert gradient.abs().max() < 10 * usual.abs().max()
        assert value_and_gradient(loss, teacher, some)[0].item() == pytest.approx(value.item(), rel=1e-5)


def test_half_precision_is_computed_in_float32():
    loss = partial(relational, distance=25.0, angle=50.0)
    assert_half_is_computed_in_float32(loss, normal(0, 5, 3, 2, 2, scale=1e4), normal(1, 5, 4, 2, 2, scale=1e4))


def test_samples_close_to_each_other_are_told_apart():
    """|a|^2 + |b|^2 - 2ab would be lost in float32."""
    student, teacher = 100 + normal(0, 5, 3, 2, 2, scale=1e-2), normal(1, 5, 4, 2, 2)
    student = student.float().double()
    found = relational(student.float(), teacher.float(), 1.0, 1.0)
    assert found.item() == pytest.approx(oracle(student, teacher, 1.0, 1.0).item(), rel=1e-2)
