"""Linear probe: multinomial logistic regression on frozen features, fitted to the optimum by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.holdout import rank_in_class

MOST_ITERATIONS = 1000
CONVERGED = 1e-6
"""Largest entry of the gradient at which the fit ends, in the coordinates of `_fit`."""


class LinearProbe(NamedTuple):
    """Features [N, D] -> logits [N, classes], in float64."""

    weight: Tensor
    """[classes, D]."""
    bias: Tensor
    """[classes]; -inf for classes without training samples, which are never predicted."""
    strength: float
    """The L2 penalty that was chosen."""

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features.to(self.weight), self.weight, self.bias)


def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strengths: Sequence[float],
    validation: tuple[Tensor, Tensor] | None = None,
) -> LinearProbe:
    """Fit on standardised features, once for each penalty, and keep the probe that is best on the validation samples.

    Minimises mean cross-entropy + strength / 2 * (sum of squared weights); biases have no penalty. Everything is
    deterministic: the problem is convex, and the start is 0. Of equally good probes the one of the largest penalty is
    kept.

    Args:
        features: [N, D].
        labels: int64 [N], from 0 to `classes` - 1.
        strengths: L2 penalties, above 0.
        validation: features [M, D] and labels [M]; None: every tenth training sample of each class, if any has ten and
            there are several strengths; the probe that is kept is then fitted to all of them again.
    """
    features = features.double()
    if validation is None and len(strengths) > 1 and int(torch.bincount(labels).max()) >= 10:
        held_out = rank_in_class(labels.cpu(), torch.arange(len(labels))).to(labels.device) % 10 == 9
        rest = ~held_out
        strength = fit_probe(
            features[rest],
            labels[rest],
            classes=classes,
            strengths=strengths,
            validation=(features[held_out], labels[held_out]),
        ).strength
        return fit_probe(features, labels, classes=classes, strengths=[strength])
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    standard = (features - mean) / std
    present, targets = labels.unique(return_inverse=True)
    parameters = features.new_zeros(len(present), features.shape[1] + 1)
    probes = []
    for strength in sorted(strengths, reverse=True):
        parameters = _fit(standard, targets, parameters, strength)  # from the optimum of the penalty before
        weight = features.new_zeros(classes, features.shape[1])
        bias = features.new_full((classes,), -torch.inf)
        weight[present] = parameters[:, :-1] / std
        bias[present] = parameters[:, -1] - weight[present] @ mean
        probes.append(LinearProbe(weight, bias, strength))
    if validation is None:
        return probes[0]
    samples, answers = validation
    right = [int((probe(samples).argmax(1) == answers).sum()) for probe in probes]
    return probes[right.index(max(right))]


def _fit(features: Tensor, targets: Tensor, start: Tensor, strength: float) -> Tensor:
    """The optimum [classes, D + 1], weights and biases, for standardised features [N, D].

    L-BFGS works in coordinates in which a bound of the Hessian is the identity: for each class 0.5 X^T X / N + strength
    (Böhning 1992, "Multinomial logistic regression algorithm"). Correlated features then take tens of steps, not
    thousands.
    """
    bound = 0.5 * features.T @ features / len(features)
    bound.diagonal().add_(max(strength, 1e-8))  # can be inverted, whatever the features
    root = torch.linalg.cholesky(bound)
    inverse = torch.linalg.inv(root)
    features = features @ inverse.T
    parameters = torch.cat([start[:, :-1] @ root, start[:, -1:]], 1).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=CONVERGED,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights, biases = parameters[:, :-1], parameters[:, -1]
        penalty = 0.5 * strength * (weights @ inverse).square().sum()
        loss = F.cross_entropy(F.linear(features, weights, biases), targets) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = parameters.detach()
    return torch.cat([found[:, :-1] @ inverse, found[:, -1:]], 1)
