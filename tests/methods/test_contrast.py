"""Contrastive matching against loops over tokens, channels and pairs of samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.methods import contrast as module
from distill.methods.base import MapsMethod, Shapes
from distill.methods.contrast import contrast
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    build_methods,
    normal,
    softmax,
    value_and_gradient,
)


def method(temperature: float = 0.07) -> MapsMethod:
    """Between maps of 3 and of 4 channels."""
    torch.manual_seed(0)
    built = build_methods([module.Options(temperature=temperature)], Shapes([2, 3], {"a": 4}, ["a"]))["contrast"]
    assert isinstance(built, MapsMethod)
    assert built.pairs == [(1, "a")]
    return built


def compare(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    return method(temperature).to(torch.promote_types(student.dtype, torch.float32)).compare(student, teacher, 0)


def cosine(one: list[Tensor], other: list[Tensor]) -> Tensor:
    lengths = [sum(value**2 for value in vector) ** 0.5 for vector in (one, other)]
    return sum(a * b for a, b in zip(one, other, strict=True)) / (lengths[0] * lengths[1])


def oracle(temperature: float):
    """All tokens are projected before the mean."""
    (layer,) = method().projections
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()

    def loss(student, teacher):
        ours = []
        for sample in student:
            tokens = [sample[:, y, x] for y in range(sample.shape[1]) for x in range(sample.shape[2])]
            projected = [
                [b + sum(w * v for w, v in zip(row, token, strict=True)) for token in tokens]
                for row, b in zip(weight, bias, strict=True)
            ]
            ours.append([sum(channel) / len(tokens) for channel in projected])
        theirs = [[sum(channel.flatten()) / channel.numel() for channel in sample] for sample in teacher]
        rows = [torch.stack([cosine(one, other) / temperature for other in theirs]) for one in ours]
        return -sum(torch.log(softmax(row)[index]) for index, row in enumerate(rows)) / len(rows)

    return loss


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("batch", [2, 4])
def test_it_is_its_formula(batch, temperature):
    student, teacher = normal(0, batch, 3, 2, 2), normal(1, batch, 4, 1, 3)
    assert_equals_oracle(lambda *maps: compare(*maps, temperature), oracle(temperature), student, teacher)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_what_does_not_matter(seed, exponent):
    """Where in the map something is, how large a vector is, and the order of samples."""
    student, teacher = normal(seed, 5, 3, 2, 2), normal(seed + 1, 5, 4, 3, 3)
    loss = compare(student, teacher)
    assert loss.item() >= 0
    places = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for same in [
        compare(student.flip(2), teacher.flatten(2)[..., places].view_as(teacher)),
        compare(student, teacher * 10**exponent),
        compare(student[order], teacher[order]),
    ]:
        torch.testing.assert_close(same, loss)
    vectors, others = student.mean((2, 3)), student.mean((2, 3)).flip(0)
    torch.testing.assert_close(contrast(vectors * 10**exponent, others, 0.1), contrast(vectors, others, 0.1))


def test_its_values():
    one_hot = torch.eye(4)
    assert contrast(one_hot, one_hot, 0.05).item() == pytest.approx(0, abs=1e-6)
    assert contrast(one_hot, one_hot.roll(1, 0), 0.05).item() == pytest.approx(20, rel=1e-5)
    assert contrast(torch.ones(4, 3), torch.ones(4, 3), 0.05).item() == pytest.approx(math.log(4))


def test_a_batch_of_one_is_zero():
    value, gradient = value_and_gradient(compare, normal(0, 1, 3, 2, 2), normal(1, 1, 4, 2, 2))
    assert value.item() == 0
    assert (gradient == 0).all()


def test_vectors_of_zeros_are_like_none():
    vectors, teacher = normal(0, 4, 3).float(), normal(1, 4, 3).float()

    def loss(student, teacher):
        return contrast(student, teacher, 0.07)

    _, usual = value_and_gradient(loss, vectors, teacher)
    vectors[1] = 0
    for student, target in ((vectors, teacher), (torch.zeros(4, 3), teacher), (vectors, torch.zeros(4, 3))):
        value, gradient = value_and_gradient(loss, student, target)
        assert value.isfinite()
        assert gradient.abs().max() < 100 * usual.abs().max()
    assert value.item() == pytest.approx(math.log(4))


def test_half_precision_does_not_overflow():
    student, teacher = normal(0, 4, 3, 8, 8, scale=1e4), normal(1, 4, 4, 4, 4, scale=1e4)
    assert_half_is_computed_in_float32(compare, student, teacher)


def test_the_projection_learns():
    built = method()
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == {
        "projections.0.weight": (4, 3),
        "projections.0.bias": (4,),
    }
    built.compare(normal(0, 4, 3, 2, 2).float(), normal(1, 4, 4, 4, 4).float(), 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.parameters())
