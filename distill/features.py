"""`Features`: logits and feature maps of a student or teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Largest difference between two forward passes on one image, relative to the largest output."""


class Features(NamedTuple):
    """The outputs of one forward pass on B images."""

    logits: Mapping[str, Tensor]
    """By head [B, classes], the class head first; empty without a classifier."""
    maps: Mapping[int | str, Tensor]
    """The requested maps by stage [B, C, h, w]: by index from 0 for a student, by name for a teacher."""
    embedding: Tensor | None = None
    """[B, D], if requested: the class token after the final norm, or the pooled features."""
    regions: Tensor | None = None
    """[B, N, E], if requested: the features of each place after the final norm; also None where a model has none."""

    @property
    def fused(self) -> Tensor:
        """The mean of the heads' logits, [B, classes] (Touvron et al. 2021, section 4)."""
        return mean_over_heads(self.logits)


def split(features: Features, parts: int) -> list[Features]:
    """Of the outputs for the images of `parts` batches of one size, one after another: those of each batch."""
    if parts == 1:
        return [features]

    def part(values: Any, index: int) -> Any:
        if isinstance(values, Mapping):
            return {name: part(value, index) for name, value in values.items()}
        return None if values is None else values.chunk(parts)[index]

    return [Features(*(part(values, index) for values in features)) for index in range(parts)]


def by_size(views: Sequence[Tensor]) -> list[list[int]]:
    """Indices of views [B, C, H, W] of the same size, for one forward pass each, in the order of the first ones."""
    sides = [images.shape[-1] for images in views]
    return [[view for view, found in enumerate(sides) if found == side] for side in dict.fromkeys(sides)]


class Stage(NamedTuple):
    """A network stage with a feature map."""

    name: str
    channels: int
    stride: int
    """Input pixels per map position, along a side."""


def mean_over_heads(values: Mapping[str, Tensor]) -> Tensor:
    """The mean of one tensor per head; with a single head it is that tensor itself."""
    first, *others = values.values()
    return sum(others, first) / (1 + len(others)) if others else first


def with_maps(model: Any, inputs: Tensor, indices: Sequence[int] | None) -> tuple[Any, list[Tensor]]:
    """A model's output and its maps [B, C, h, w] in one forward pass, by timm's `forward_intermediates`.

    Args:
        indices: of the maps, ascending; None: all.
    """
    final, maps = final_and_maps(model, inputs, indices)
    return model.forward_head(final), maps


def final_and_maps(model: Any, inputs: Tensor, indices: Sequence[int] | None) -> tuple[Any, list[Tensor]]:
    """What a timm model's `forward_head` takes, and its maps; see `with_maps`."""
    # By default some timm models (Hiera) stop after the last map, and their logits lack the following blocks.
    return model.forward_intermediates(inputs, indices=None if indices is None else list(indices), stop_early=False)


def problem_of_maps(outputs: Sequence[Tensor], expected: Sequence[Tensor], maps: Sequence[Any]) -> str | None:
    """Why a forward pass with `outputs` and `maps` is invalid, if it is; the plain pass returns `expected`."""
    if not maps:
        return "it has none"
    if wrong := [found for found in maps if not isinstance(found, Tensor) or found.dim() != 4]:
        shape = list(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        return f"one is {shape} instead of [batch, channels, height, width]"
    for output, plain in zip(outputs, expected, strict=True):
        scale = plain.abs().max().item()
        if not torch.allclose(output, plain, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            return "the logits differ when maps are returned"
    return None


def example_image(channels: int, size: int, device: torch.device) -> Tensor:
    """A random image [1, channels, size, size] in [0, 1], always the same."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)
