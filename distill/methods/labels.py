"""The label loss: cross-entropy with smoothed targets, part of every recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F


def labels(
    logits: Mapping[str, Tensor],
    targets: Tensor,
    *,
    smoothing: float,
    all_heads: bool,
    labelled: Tensor | None = None,
    number: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """CE(class head, targets), the mean over samples, in float32; `all_heads`: the mean of it over the heads.

    Args:
        logits: [B, classes] by head, the class head first.
        targets: [B, classes], rows summing to 1 (soft where images were mixed).
        labelled: bool [B], samples that have a label; the others have no part in it. None: all.
        number: in place of that of this micro-batch, what the sum over labelled samples is divided by: with their mean
            number over the micro-batches of a global batch, the mean of the losses is that over all labelled samples.
        weights: [classes]. The loss of a sample is then sum_c targets_c * weights_c * CE(logits, c smoothed): that of
            torch's `cross_entropy` with these weights and soft targets, which divides by the number of samples, not by
            their weights. Unlike there, smoothing has the weight of the sample, and not that of the other classes.
    """
    if weights is not None:
        targets = targets.float() * weights
        targets = (1 - smoothing) * targets + smoothing / targets.shape[1] * targets.sum(1, keepdim=True)
        smoothing = 0.0
    trained = list(logits.values()) if all_heads else [next(iter(logits.values()))]
    reduction = "mean" if labelled is None else "none"
    losses = [
        F.cross_entropy(each.float(), targets.float(), label_smoothing=smoothing, reduction=reduction)
        for each in trained
    ]
    if labelled is not None:
        losses = [loss.where(labelled, 0.0).sum() / (labelled.sum() if number is None else number) for loss in losses]
    return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)
