"""What a network, student or teacher, makes of a batch of images: its logits and its feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """The outputs of one forward pass on B images."""

    logits: Mapping[str, Tensor]
    """By head [B, classes], the class head first; empty where there is no classifier."""
    maps: Mapping[int | str, Tensor]
    """By stage [B, C, h, w]: those that were asked for. A student counts its stages from 0, a teacher names them."""

    @property
    def fused(self) -> Tensor:
        """The model's answer, [B, classes]: the mean of its heads' logits (Touvron et al. 2021, section 4)."""
        return mean_over_heads(self.logits)


def mean_over_heads(values: Mapping[str, Tensor]) -> Tensor:
    """The mean of one tensor per head; with a single head it is that tensor itself."""
    first, *others = values.values()
    return sum(others, first) / (1 + len(others)) if others else first
