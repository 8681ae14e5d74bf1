"""The linear probe against scikit-learn's logistic regression."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from distill.evaluation.linear import fit_probe


def sample(n: int = 300, dim: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    features = centres[labels] + 1.5 * torch.randn(n, dim, generator=generator)
    return features * torch.logspace(-2, 2, dim) + 3.0, labels


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("correlated", [False, True])
def test_the_optimum_is_that_of_a_second_optimiser(strength: float, correlated: bool) -> None:
    features, labels = sample()
    if correlated:  # nearly of one direction, and one twice
        features = features + 100.0 * features.sum(1, keepdim=True)
        features[:, 1] = features[:, 0]
    probe = fit_probe(features, labels, classes=4, strengths=[strength])
    exact = features.double()
    standard = (exact - exact.mean(0)) / exact.std(0, correction=0)
    model = LogisticRegression(C=1 / (strength * len(labels)), solver="newton-cg", tol=1e-10, max_iter=1000)
    model.fit(standard.numpy(), labels.numpy())
    expected = torch.from_numpy(model.predict_proba(standard.numpy()))
    torch.testing.assert_close(probe(features).softmax(1), expected, rtol=1e-4, atol=1e-6)


def test_the_penalty_is_chosen_on_validation_samples() -> None:
    features, labels = sample(40, 30)
    validation = sample(400, 30)
    strengths = [1e-6, 1e-3, 1e-1, 1.0, 100.0]
    right = []
    for strength in sorted(strengths, reverse=True):
        probe = fit_probe(features, labels, classes=4, strengths=[strength])
        right.append(int((probe(validation[0]).argmax(1) == validation[1]).sum()))
    chosen = fit_probe(features, labels, classes=4, strengths=strengths, validation=validation)
    assert chosen.strength == sorted(strengths, reverse=True)[right.index(max(right))]
    assert min(right) < max(right)


@pytest.mark.parametrize("classes", [4, 10])
def test_without_validation_samples_a_tenth_of_each_class_chooses(classes: int) -> None:
    features, labels = sample(200, classes=classes)  # whose labels take turns: every tenth of all may be of one class
    held_out = torch.zeros(200, dtype=torch.bool)
    for label in range(classes):
        held_out[torch.nonzero(labels == label)[9::10]] = True
    strengths = [1e-5, 1e-2, 10.0]
    expected = fit_probe(
        features[~held_out],
        labels[~held_out],
        classes=classes,
        strengths=strengths,
        validation=(features[held_out], labels[held_out]),
    )
    probe = fit_probe(features, labels, classes=classes, strengths=strengths)
    assert probe.strength == expected.strength
    again = fit_probe(features, labels, classes=classes, strengths=[probe.strength])
    assert torch.equal(probe.weight, again.weight)
    assert torch.equal(probe.bias, again.bias)


def test_two_classes_missing_classes_and_constant_features() -> None:
    features, labels = sample(100, 5, classes=2)
    features[:, 2] = 7.0
    probe = fit_probe(features, 2 * labels, classes=4, strengths=[1e-2])
    assert probe(features).argmax(1).unique().tolist() == [0, 2]
    assert probe.bias[[1, 3]].tolist() == [-torch.inf] * 2
    assert (probe(features).argmax(1) == 2 * labels).float().mean() > 0.7
    everywhere = fit_probe(torch.ones(12, 3), torch.tensor([0] * 8 + [1] * 4), classes=2, strengths=[1e-3])
    torch.testing.assert_close(
        everywhere(torch.ones(1, 3)).softmax(1), torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64), atol=1e-5, rtol=0
    )
