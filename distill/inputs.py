"""Input contracts: normalisation, size and channels of a model; images everywhere else are floats in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputContract:
    """Mean and standard deviation per channel (of images in [0, 1]), side in pixels (None: any), and interpolation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    interpolation: str = "bicubic"

    def __str__(self) -> str:
        def numbers(values: Sequence[float]) -> str:
            return ", ".join(f"{value:.4g}" for value in values)

        size = f"{self.size} px by {self.interpolation}" if self.size else "any size"
        return f"mean ({numbers(self.mean)}), std ({numbers(self.std)}), {size}"


class Preparation(NamedTuple):
    """Evaluation preprocessing from an image to pixels in [0, 1]."""

    channels: int = 3
    """1: images are converted to greyscale."""
    by_pillow: bool = True
    """Whether Pillow makes images squares of the student's size, by `fit`; else they are resized whole, as floats."""
    square: bool = True
    """Whether the data's images are square; then other images are centre-cropped to a square."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB, under transparent pixels, and beside padded images."""
    fit: str = "crop"
    """The recipe's `data.fit`: crop, squash or pad."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preparation:
        """From `_asdict()` as JSON, perhaps of an earlier version, without the later fields."""
        preparation = cls(**values)
        red, green, blue = preparation.background
        return preparation._replace(background=(red, green, blue))

    @classmethod
    def of(
        cls, image: Tensor, size: int, background: tuple[int, int, int] = (255, 255, 255), fit: str = "crop"
    ) -> Preparation:
        """From a test image [C, H, W] of the dataset, for a student of this size."""
        channels, height, width = image.shape
        return cls(channels, (height, width) == (size, size), height == width, background, fit)


class InputAdapter(nn.Module):
    """Resizes and normalises images in [0, 1] for a model: [B, C, H, W] -> [B, len(mean), size, size].

    Greyscale images are repeated for a model with three channels. Mean and std are non-persistent buffers. `side`, if
    given, takes the place of the contract's size, and bilinear interpolation that of its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, contract: InputContract) -> None:
        super().__init__()
        self.contract = contract
        self.register_buffer("mean", torch.tensor(contract.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(contract.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor, side: int | None = None) -> Tensor:
        return (self.fit(images, side) - self.mean) / self.std

    def fit(self, images: Tensor, side: int | None = None) -> Tensor:
        """Resize and repeat channels; still in [0, 1]."""
        size, channels = side or self.contract.size, self.mean.shape[1]
        if size is not None and images.shape[-2:] != (size, size):
            images = resize(images, size, "bilinear" if side else self.contract.interpolation)
        if images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        return images


def resize(images: Tensor, size: int, interpolation: str) -> Tensor:
    """[B, C, H, W] in [0, 1] -> [B, C, size, size] in [0, 1], antialiased when shrinking, as PIL does."""
    if interpolation == "nearest":
        return F.interpolate(images, (size, size), mode="nearest-exact")
    images = F.interpolate(images, (size, size), mode=interpolation, antialias=min(images.shape[-2:]) > size)
    return images.clamp(0.0, 1.0)  # bicubic overshoots at edges
