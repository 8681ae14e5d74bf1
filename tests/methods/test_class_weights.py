"""Weights of classes in the label loss and in methods on logits, against torch and loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data import Batch
from distill.features import Features
from distill.methods.base import Shapes
from distill.methods.labels import labels
from distill.recipe import from_mapping
from distill.teaching.source import StepIndex
from tests.methods.helpers import build_methods, normal, task_of

WEIGHTS = torch.tensor([0.25, 0.5, 1.0, 4.0, 9.0])
LABELS = torch.tensor([0, 0, 1, 4, 3, 2])
TARGETS = F.one_hot(LABELS, 5).float()
MIXED = 0.7 * TARGETS + 0.3 * TARGETS.flip(0)


@pytest.mark.parametrize("targets", [TARGETS, MIXED], ids=["plain", "mixed"])
def test_the_label_loss_is_torchs_weighted_cross_entropy(targets: Tensor) -> None:
    """Of soft targets; of class numbers, with the mean weight of the batch in place of 1."""
    logits = normal(0, 6, 5).float()
    found = labels({"cls": logits}, targets, smoothing=0.0, all_heads=False, weights=WEIGHTS)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, weight=WEIGHTS))
    if targets is TARGETS:
        by_number = F.cross_entropy(logits, LABELS, weight=WEIGHTS) * WEIGHTS[LABELS].mean()
        torch.testing.assert_close(found, by_number)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_label_loss_is_a_sum_over_labels(smoothing: float) -> None:
    heads = {"cls": normal(0, 6, 5), "dist": normal(1, 6, 5)}
    expected = 0.0
    for logits in heads.values():
        for row, target in zip(logits.log_softmax(1).tolist(), MIXED.double().tolist(), strict=True):
            for label, share in enumerate(target):
                smooth = [smoothing / 5 + (1 - smoothing) * (of == label) for of in range(5)]
                cross_entropy = -sum(p * value for p, value in zip(smooth, row, strict=True))
                expected += share * float(WEIGHTS[label]) * cross_entropy / 6 / 2
    known = torch.ones(6, dtype=torch.bool)
    for labelled in (None, known):
        found = labels(heads, MIXED, smoothing=smoothing, all_heads=True, labelled=labelled, weights=WEIGHTS)
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"method": "hard"}, {"method": "soft", "temperature": 2.0}, {"method": "soft", "standardize": True},
                {"method": "dkd"}, {"method": "dist"}], ids=str,
)  # fmt: skip
def test_methods_on_logits_weigh_each_image(options: dict[str, Any]) -> None:
    """By its labels, in their shares; one without a label by 1. `dist` compares images and weighs none."""
    recipe = from_mapping({"teacher": {"model": "a"}, "distill": [options]})
    methods = build_methods(recipe.distill, Shapes(num_classes=5))
    student, teacher = normal(2, 6, 5, scale=2.0), normal(3, 6, 5, scale=2.0)
    unlabelled = options["method"] != "dkd"
    known = LABELS.clone()
    targets = MIXED.clone()
    if unlabelled:
        known[2], targets[2] = -1, 0.0

    def loss(of: slice, weights: Tensor | None) -> Tensor:
        given = student[of].clone().requires_grad_()
        task = task_of(methods, {"cls": given}, {}, Features({"cls": teacher[of]}, {}))
        task.class_weights = weights
        task.labelled_images = float((known[of] >= 0).sum().clamp_min(1)) if unlabelled else None
        size = len(given)
        batch = Batch(torch.zeros(size, 3, 8, 8), targets[of], known[of], torch.arange(size))
        part: Tensor = task(batch, StepIndex(0, 0), 0.5).parts[options["method"]]
        (gradient,) = torch.autograd.grad(part, given)
        return torch.cat([part.detach()[None], gradient.flatten()])

    whole, plain = loss(slice(0, 6), WEIGHTS), loss(slice(0, 6), None)
    if options["method"] == "dist":
        assert torch.equal(whole, plain)
        return
    expected = torch.zeros_like(whole)
    for row in range(6):
        weight = math.fsum(t * w for t, w in zip(targets[row].tolist(), WEIGHTS.tolist(), strict=True))
        weight = weight if known[row] >= 0 else 1.0
        alone = weight * loss(slice(row, row + 1), None) / 6
        expected[0] += alone[0]
        expected[1 + 5 * row : 6 + 5 * row] += alone[1:]
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
    assert (whole - plain).abs().max() > 1e-3
    torch.testing.assert_close(loss(slice(0, 6), torch.ones(5)), plain, rtol=1e-5, atol=1e-6)
