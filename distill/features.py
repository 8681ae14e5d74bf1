"""What a network, student or teacher, makes of a batch of images: its logits and its feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Largest difference between two forward passes of one network on one image, as a share of its largest output."""


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


class Stage(NamedTuple):
    """A place of a network whose feature map can be asked for."""

    name: str
    channels: int
    stride: int
    """Pixels of the input, along a side, for one place of the map."""


def mean_over_heads(values: Mapping[str, Tensor]) -> Tensor:
    """The mean of one tensor per head; with a single head it is that tensor itself."""
    first, *others = values.values()
    return sum(others, first) / (1 + len(others)) if others else first


def with_maps(model: Any, inputs: Tensor, indices: Sequence[int] | None) -> tuple[Any, list[Tensor]]:
    """A model's output and its maps [B, C, h, w] in one forward pass, by timm's `forward_intermediates`.

    Args:
        indices: of the maps, rising; None: all of them.
    """
    # timm's default is to stop after the last map in some models (Hiera), whose head then lacks the blocks that follow.
    final, maps = model.forward_intermediates(
        inputs, indices=None if indices is None else list(indices), stop_early=False
    )
    return model.forward_head(final), maps


def problem_of_maps(outputs: Sequence[Tensor], expected: Sequence[Tensor], maps: Sequence[Any]) -> str | None:
    """What is wrong with a forward pass that gave `outputs` and `maps` where the plain one gives `expected`, if
    anything is.
    """
    if not maps:
        return "it has none"
    if wrong := [found for found in maps if not isinstance(found, Tensor) or found.dim() != 4]:
        shape = list(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        return f"one is {shape} instead of [batch, channels, height, width]"
    for output, plain in zip(outputs, expected, strict=True):
        scale = plain.abs().max().item()
        if not torch.allclose(output, plain, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            return "the pass that reads them gives other logits"
    return None


def example_image(channels: int, size: int, device: torch.device) -> Tensor:
    """A random image [1, channels, size, size] in [0, 1], the same everywhere."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)
