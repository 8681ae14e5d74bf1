"""Hints against loops over channels and positions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distill.methods.fitnet import Hint
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    value_and_gradient,
)


def fitnet(seed, student_channels, teacher_channels):
    torch.manual_seed(seed)
    return Hint(student_channels, teacher_channels)


def oracle(module):
    """Of maps whose sides the teacher's are twice, or as long."""
    weight, bias = module.regressor.weight.detach().double(), module.regressor.bias.detach().double()

    def loss(student, teacher):
        ratio = teacher.shape[2] // student.shape[2]
        batch, _, height, width = student.shape
        errors = []
        for n in range(batch):
            for channel in range(len(weight)):
                for y in range(height):
                    for x in range(width):
                        patch = teacher[n, channel, y * ratio : (y + 1) * ratio, x * ratio : (x + 1) * ratio]
                        products = zip(weight[channel, :, 0, 0], student[n, :, y, x], strict=True)
                        guess = bias[channel] + sum(w * v for w, v in products)
                        errors.append((guess - sum(patch.flatten()) / ratio**2) ** 2)
        return sum(errors) / len(errors)

    return loss


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [2, 4], ids=["same", "larger"])
def test_it_is_its_formula(batch, size):
    single = fitnet(0, 3, 4)
    double = fitnet(0, 3, 4).double()

    def loss(student, teacher):
        return (double if student.dtype == torch.float64 else single)(student, teacher)

    student, teacher = normal(0, batch, 3, 2, 2), normal(1, batch, 4, size, size)
    assert_equals_oracle(loss, oracle(double), student, teacher, tolerance=1e-6)


def test_the_regressor_learns():
    module = fitnet(0, 3, 5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "regressor.weight": (5, 3, 1, 1),
        "regressor.bias": (5,),
    }
    student, teacher = normal(0, 2, 3, 4, 4).float(), normal(1, 2, 5, 8, 8).float()
    module(student, teacher).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_zero_when_the_regressor_makes_the_teachers_map():
    module = fitnet(0, 3, 5)
    student = normal(0, 2, 3, 4, 4).float()
    teacher = module.regressor(student).detach()
    assert module(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert module(student, F.interpolate(teacher, scale_factor=2)).item() == pytest.approx(0, abs=1e-12)
    assert module(student, teacher + 1).item() == pytest.approx(1, rel=1e-5)


def test_a_smaller_map_of_the_teacher_is_enlarged():
    module = fitnet(0, 3, 5)
    student, teacher = normal(0, 2, 3, 4, 4).float(), normal(1, 2, 5, 1, 1).float()
    torch.testing.assert_close(module(student, teacher), module(student, teacher.expand(2, 5, 4, 4)))


def test_half_precision_is_computed_in_float32():
    student, teacher = normal(0, 2, 3, 4, 4, scale=1000), normal(1, 2, 5, 8, 8, scale=1000)
    assert_half_is_computed_in_float32(fitnet(0, 3, 5), student, teacher)


def test_no_gradient_reaches_the_teacher():
    value_and_gradient(fitnet(0, 3, 5), normal(0, 2, 3, 4, 4).float(), normal(1, 2, 5, 8, 8).float())
