"""Nearest neighbours against a plain loop in float64, and against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from distill.evaluation import knn
from distill.evaluation.knn import knn_votes, nearest


def by_hand(features: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    votes = torch.zeros(len(features), classes, dtype=torch.float64)
    for row, one in enumerate(features.tolist()):
        cosines = []
        for other in bank.tolist():
            product = sum(a * b for a, b in zip(one, other, strict=True))
            cosines.append(product / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other)))
        for index in sorted(range(len(bank)), key=lambda index: (-cosines[index], index))[:k]:
            votes[row, labels[index]] += math.exp(cosines[index] / temperature)
    return votes


def sample(n: int, m: int, dim: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * m)
    draw = torch.randn(n + m, dim, generator=generator, dtype=torch.float64) * 3
    return draw[:n], draw[n:], torch.randint(0, classes, (m,), generator=generator)


@pytest.mark.parametrize(("n", "m", "k"), [(7, 40, 20), (130, 33, 1), (3, 20, 20), (1, 1, 1), (0, 4, 2)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes(n: int, m: int, k: int, temperature: float) -> None:
    features, bank, labels = sample(n, m)
    votes = knn_votes(features, bank, labels, classes=5, k=k, temperature=temperature)
    assert votes.dtype == torch.float64
    assert votes.shape == (n, 5)
    torch.testing.assert_close(votes, by_hand(features, bank, labels, 5, k, temperature), rtol=1e-9, atol=0)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, bank, labels = (values.float() if values.is_floating_point() else values for values in sample(50, 30))
    whole = knn_votes(features, bank, labels, classes=5)
    monkeypatch.setattr(knn, "MOST_AT_ONCE", 100)  # three rows at a time
    torch.testing.assert_close(knn_votes(features, bank, labels, classes=5), whole, rtol=1e-4, atol=1e-3)
    assert whole.dtype == torch.float32


def test_of_equal_neighbours_the_first_count() -> None:
    # Unit vectors along the axes: cosines are exactly 0 or 1.
    axes = torch.eye(4, dtype=torch.float64)
    bank = axes[[1, 0, 0, 2, 0, 0, 3, 0]]
    labels = torch.tensor([3, 0, 1, 3, 2, 0, 3, 1])
    found = nearest(axes[:1], bank, 7)
    assert found.indices.tolist() == [[1, 2, 4, 5, 7, 0, 3]]
    votes = knn_votes(axes[:1], bank, labels, classes=4, k=3, temperature=1.0)
    torch.testing.assert_close(votes, torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64) * math.e)
    # Its own, then the first two of cosine 0.
    votes = knn_votes(axes[3:], bank, labels, classes=4, k=3, temperature=1.0)
    expected = torch.tensor([[1.0, 0.0, 0.0, math.e + 1]], dtype=torch.float64)
    torch.testing.assert_close(votes, expected)


def test_votes_of_collapsed_features_are_those_of_the_first_samples() -> None:
    votes = knn_votes(torch.ones(3, 8), torch.ones(50, 8), torch.arange(50) % 5, classes=5, k=7, temperature=1.0)
    torch.testing.assert_close(votes / math.e, torch.tensor([[2.0, 2.0, 1.0, 1.0, 1.0]]).expand(3, 5))


def test_scikit_learn_agrees() -> None:
    features, bank, labels = sample(60, 90)
    model = KNeighborsClassifier(
        9,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: torch.tensor((1 - distances) / 0.07).exp().numpy(),
    )
    expected = torch.from_numpy(model.fit(bank.numpy(), labels.numpy()).predict_proba(features.numpy()))
    votes = knn_votes(features, bank, labels, classes=5, k=9)
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), expected)


@pytest.mark.parametrize("k", [0, 41])
def test_k_is_at_most_the_number_of_training_samples(k: int) -> None:
    features, bank, labels = sample(7, 40)
    with pytest.raises(ValueError, match="1 to 40"):
        knn_votes(features, bank, labels, classes=5, k=k)
