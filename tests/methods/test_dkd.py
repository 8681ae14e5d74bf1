"""Decoupled distillation against the paper's formula in loops, and what is sure against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distill.methods.dkd import dkd
from distill.methods.soft import soft
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    softmax,
    value_and_gradient,
)

LABELS = [3, 0, 5, 5]
ONE_HOT = F.one_hot(torch.tensor(LABELS), 6).double()
MIXED = 0.7 * ONE_HOT + 0.3 * ONE_HOT.roll(1, dims=0)  # the last row stays of one label


def divergence(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def of_one_label(student, teacher, label, alpha, beta, temperature):
    """Of one sample, [classes]."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    tckd = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [place for place in range(len(p)) if place != label]
    nckd = divergence([p[i] / (1 - p[label]) for i in others], [q[i] / (1 - q[label]) for i in others])
    return temperature**2 * (alpha * tckd + beta * nckd)


def oracle(student, teacher, targets, **options):
    total = 0.0
    for s, t, target in zip(student, teacher, targets.tolist(), strict=True):
        total = total + sum(share * of_one_label(s, t, label, **options) for label, share in enumerate(target) if share)
    return total / len(student)


@pytest.mark.parametrize("targets", [ONE_HOT, MIXED, ONE_HOT[:1], MIXED[:1]], ids=["one", "two", "one1", "two1"])
@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (2, 1, 0.5)]
)
def test_it_is_its_formula(targets, alpha, beta, temperature):
    options = {"targets": targets, "alpha": alpha, "beta": beta, "temperature": temperature}
    student, teacher = normal(0, len(targets), 6, scale=2), normal(1, len(targets), 6, scale=2)
    assert_equals_oracle(partial(dkd, **options), partial(oracle, **options), student, teacher)


def test_two_classes_have_no_others_to_compare():
    student, teacher, targets = normal(0, 4, 2), normal(1, 4, 2), torch.eye(2)[[0, 1, 1, 0]]
    assert dkd(student, teacher, targets, 0.0, 1.0, 2.0).item() == 0
    torch.testing.assert_close(dkd(student, teacher, targets, 1.0, 5.0, 2.0), soft(student, teacher, 2.0))


def test_with_the_teachers_doubt_as_beta_it_is_soft_distillation():
    """The paper's section 3.1, sample by sample."""
    student, teacher, temperature = normal(0, 4, 6), normal(1, 4, 6), 2.0
    for s, t, target in zip(student.split(1), teacher.split(1), ONE_HOT.split(1), strict=True):
        doubt = 1 - ((t / temperature).softmax(1) * target).sum().item()
        torch.testing.assert_close(dkd(s, t, target, 1.0, doubt, temperature), soft(s, t, temperature))


def test_shares_need_not_sum_to_one_exactly():
    student, teacher, options = normal(0, 4, 6), normal(1, 4, 6), {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    half = dkd(student, teacher, MIXED.bfloat16(), **options)
    torch.testing.assert_close(half, dkd(student, teacher, MIXED, **options), rtol=1e-2, atol=0)
    torch.testing.assert_close(dkd(student, teacher, MIXED * 1.01, **options), dkd(student, teacher, MIXED, **options))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 20.0), st.floats(0.1, 50.0), st.floats(-50.0, 50.0))
def test_never_negative_zero_when_identical_and_no_offset_matters(seed, temperature, scale, offset):
    student, teacher = normal(seed, 4, 6, scale=scale), normal(seed + 1, 4, 6, scale=scale)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    loss = dkd(student, teacher, MIXED, 1.0, 8.0, temperature)
    assert loss.item() >= -1e-9
    torch.testing.assert_close(dkd(student + offset, teacher, MIXED, 1.0, 8.0, temperature), loss)
    torch.testing.assert_close(dkd(student[order], teacher[order], MIXED[order], 1.0, 8.0, temperature), loss)
    assert dkd(student, student + offset, MIXED, 1.0, 8.0, temperature).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("targets", [ONE_HOT, MIXED], ids=["one", "two"])
@pytest.mark.parametrize("scale", [30, 1000])
def test_half_precision_and_a_sure_teacher(scale, targets):
    """Each is sure of some class, here the label and there another: all of p_t, 1 - p_t and the rest become 0."""
    student = F.one_hot(torch.tensor([3, 1, 5, 0]), 6) * 2.0 * scale - scale
    teacher = F.one_hot(torch.tensor([3, 0, 5, 4]), 6) * 2.0 * scale - scale
    loss = partial(dkd, targets=targets, alpha=1.0, beta=8.0, temperature=1.0)
    for a, b in [(student, teacher), (teacher, student), (teacher, teacher), (student, normal(0, 4, 6))]:
        assert_half_is_computed_in_float32(loss, a, b)
        value, gradient = value_and_gradient(loss, a.float(), b.float())
        exact, exact_gradient = value_and_gradient(loss, a.double(), b.double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


def test_a_sure_students_small_doubt_is_exact():
    """1 - p_t of e^-40 is lost in a softmax; the others' proportions within it are not."""
    student, teacher = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0]])
    p = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).softmax(0)[0].item()
    doubt = 2 * torch.tensor(-40.0, dtype=torch.float64).exp()
    expected = p * torch.tensor(p).log() + (1 - p) * (torch.tensor(1 - p).log() - doubt.log())
    assert dkd(student, teacher, targets, 1.0, 8.0, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)
