"""The label loss: cross-entropy with smoothed targets, part of every recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F


def labels(logits: Mapping[str, Tensor], targets: Tensor, *, smoothing: float, all_heads: bool) -> Tensor:
    """CE(class head, targets), the mean over samples, in float32; `all_heads`: the mean of it over the heads.

    Args:
        logits: [B, classes] by head, the class head first.
        targets: [B, classes], rows summing to 1 (soft where images were mixed).
    """
    trained = list(logits.values()) if all_heads else [next(iter(logits.values()))]
    losses = [F.cross_entropy(each.float(), targets.float(), label_smoothing=smoothing) for each in trained]
    return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)
