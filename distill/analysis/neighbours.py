"""What a report shows of nearest neighbours: some test images with theirs, and the accuracy that raw pixels have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data import Dataset, Split
from distill.evaluation.frozen import Bank, Found, log_shares
from distill.evaluation.knn import nearest
from distill.report.metrics import decisions

PICTURES = 12
"""Test images that are shown, half of them with a right answer."""
NEIGHBOURS = 5
LARGEST_SIDE = 32
MOST_PIXELS = 2**28
"""Values of all training images that are compared as pixels."""
WORK = {"cpu": 1e12, "cuda": 1e15}
"""FLOPs of comparing pixels, at most."""


def shown_neighbours(found: Found, labels: Tensor, order: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Which test images to show: the first of `order` whose answer is right, and as many whose answer is wrong.

    Args:
        labels: int64 [N], of the test images.
        order: all their indices.

    Returns:
        n indices, which rise; their nearest training images, int64 [n, NEIGHBOURS] rows of the bank; and the cosines.
    """
    assert found.votes is not None
    right = torch.from_numpy(decisions(found.votes.numpy())) == labels
    half = PICTURES // 2
    chosen = [[index for index in order if bool(right[index]) is kind][:half] for kind in (True, False)]
    indices = sorted([*chosen[0], *chosen[1]])
    neighbours = nearest(found.features[indices], found.bank.features, min(NEIGHBOURS, len(found.bank.labels)))
    return indices, neighbours.indices, neighbours.similarities


def pixel_accuracy(dataset: Dataset, found: Found, order: list[int]) -> dict[str, Any]:
    """Right answers of the same votes on pixels, normalised by the data's statistics, in place of features.

    Images are reduced to at most 32 pixels a side, and test images to the first of `order`, as many as can be compared
    in reasonable time.
    """
    assert found.options is not None
    device, bank = dataset.device, found.bank
    channels = dataset.info.channels
    side = LARGEST_SIDE
    while side > 1 and len(bank.labels) * channels * side**2 > MOST_PIXELS:
        side //= 2
    features = _pixels(dataset, "train", side)[bank.indices]
    tested = _pixels(dataset, "test", side)
    count = int(WORK[device.type] / (2 * len(bank.labels) * features.shape[1]))
    chosen = torch.tensor(order[: max(1, count)])
    shares = log_shares(
        tested[chosen],
        Bank(features, bank.labels, bank.indices),
        found.options,
        classes=dataset.info.num_classes,
        device=device,
    )
    correct = int((decisions(shares.numpy()) == dataset.labels("test")[chosen].numpy()).sum())
    return {"images": len(chosen), "correct": correct}


def _pixels(dataset: Dataset, split: Split, side: int) -> Tensor:
    """float32 [N, C * h * w] on the CPU."""
    statistics = (dataset.info.mean, dataset.info.std)
    mean, std = (torch.tensor(values, device=dataset.device).view(-1, 1, 1) for values in statistics)
    parts = []
    for images, _ in dataset.evaluation_batches(split, 0, dataset.info.sizes[split], 256):
        if max(images.shape[-2:]) > side:
            images = F.adaptive_avg_pool2d(images, (min(side, images.shape[-2]), min(side, images.shape[-1])))
        parts.append(((images - mean) / std).flatten(1).cpu())
    return torch.cat(parts)
