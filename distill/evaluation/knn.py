"""Weighted nearest neighbours on frozen features (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, 2104.14294)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_AT_ONCE = 2**24
"""Similarities that are held at a time."""


class Neighbours(NamedTuple):
    """The k nearest training samples of N samples, the nearest first."""

    similarities: Tensor
    """Cosines [N, k]."""
    indices: Tensor
    """int64 [N, k], rows of the training features."""


def knn_votes(
    features: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The votes of the k nearest training samples: each gives its class exp(cosine / temperature).

    Computed in float32, or in float64 if the features have it. A row of features that is not numbers has votes that are
    not numbers.

    Args:
        features: [N, D], any N and any lengths; only their directions count.
        train_features: [M, D].
        train_labels: int64 [M], from 0 to `classes` - 1.
        k: 1 to M. Of equal cosines the training samples of lower index are nearer.

    Returns:
        [N, classes], not normalised.

    Raises:
        ValueError: k is not 1 to M.
    """
    parts = []
    for similarities, indices in _blocks(features, train_features, k):
        votes = similarities.new_zeros(len(indices), classes)
        parts.append(votes.scatter_add_(1, train_labels[indices], (similarities / temperature).exp()))
    return torch.cat(parts)


def nearest(features: Tensor, train_features: Tensor, k: int) -> Neighbours:
    """The k nearest of the training features [M, D] for each row of `features` [N, D], by cosine; see `knn_votes`."""
    similarities, indices = zip(*_blocks(features, train_features, k), strict=True)
    return Neighbours(torch.cat(similarities), torch.cat(indices))


def _blocks(features: Tensor, train_features: Tensor, k: int) -> Iterator[Neighbours]:
    """Neighbours of consecutive rows, as many at a time as `MOST_AT_ONCE` allows; at least one block."""
    size = len(train_features)
    if not 1 <= k <= size:
        raise ValueError(f"k should be 1 to {size}, the number of training samples; got {k}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    bank = F.normalize(train_features.to(dtype), dim=1)
    for block in features.split(max(1, MOST_AT_ONCE // size)):
        yield _nearest(F.normalize(block.to(dtype), dim=1) @ bank.T, k)


def _nearest(similarities: Tensor, k: int) -> Neighbours:
    """The k largest of each row of [n, M], of equal ones those of lower index."""
    values, indices = similarities.topk(k, dim=1)
    # `topk` takes any of the values that equal the last one, and gives equal values in any order.
    ties = (similarities == values[:, -1:]).sum(1) > (values == values[:, -1:]).sum(1)
    ties |= (values[:, 1:] == values[:, :-1]).any(1)
    if ties.any():
        ordered = similarities[ties].sort(dim=1, descending=True, stable=True)
        values[ties], indices[ties] = ordered.values[:, :k], ordered.indices[:, :k]
    return Neighbours(values, indices)
