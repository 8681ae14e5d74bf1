"""`data.views`: several crops of each image (multi-crop), batched on the device.

All operations are exact on 8-bit levels, so views are the same in every micro-batch, on every process and every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distill.data import photometric
from distill.data.augment import to_float
from distill.data.filters import bicubic_crop, gaussian_blur
from distill.data.geometry import RESIZED_CROP_DRAWS, crop_boxes
from distill.data.policies import Layer, Operation, color_jitter
from distill.data.randomness import hashes, keys, uniform, view_suffix
from distill.data.rows import update
from distill.recipe.views import View

BLUR_REACH = 4
"""Half the width of a blur's kernel, in largest standard deviations."""
SOLARIZED_FROM = 128.0


class MultiCrop:
    """Raw images -> the views of `data.views`, pure functions of (seed, epoch, sample index, view).

    Operations are torchvision's, in DINO's order: RandomResizedCrop (bicubic with antialiasing), RandomHorizontalFlip,
    ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize, each rounded to 8-bit levels, as of PIL images.

    `cropped`: images are the crops already.
    """

    paired = False
    """Whether samples are mixed two by two."""

    def __init__(self, groups: Sequence[View], device: torch.device, *, cropped: bool = False) -> None:
        self.cropped = cropped
        self._groups = [_Group(group, device, cropped=cropped) for group in groups]

    def __call__(self, images: Sequence[Tensor], indices: Tensor, *, seed: int, epoch: int, views: int) -> list[Tensor]:
        """The first `views` views, each float32 [B, C, size, size] in [0, 1].

        Args:
            images: uint8 [B, C, H, W], the whole images, or the crops of each view.
            indices: int64 [B], of the samples.
        """
        made: list[Tensor] = []
        for group in self._groups:
            numbers = range(len(made), min(views, len(made) + group.spec.count))
            if numbers:
                given = [images[view] for view in numbers] if self.cropped else list(images)
                made += group(given, indices, seed=seed, epoch=epoch, views=numbers)
        return made

    def compile(self) -> None:
        """Compile from the next call on; see `Augmenter.compile`."""
        for group in self._groups:
            group.compile()


class _Group:
    """The views of one size and augmentation, made together."""

    def __init__(self, spec: View, device: torch.device, *, cropped: bool) -> None:
        self.spec = spec
        self.device = device
        jitter = spec.color_jitter
        wanted = jitter is not None and any(dict(jitter).values()) and spec.jitter_probability > 0
        self._jitter = color_jitter(jitter).to(device) if jitter is not None and wanted else None
        self._rows: dict[str, slice] = {}
        self._names: list[str] = []
        for name, draws, when in (
            ("crop", RESIZED_CROP_DRAWS, not cropped),
            ("flip", ("flip",), spec.hflip),
            ("jitter", self._jitter.draws if self._jitter is not None else (), self._jitter is not None),
            ("jitter/whether", ("color-jitter/whether",), self._jitter is not None),
            ("grey", ("grey",), spec.grey > 0),
            ("blur", ("blur/whether", "blur/sigma"), spec.blur > 0),
            ("solarize", ("solarize",), spec.solarize > 0),
        ):
            if when:
                self._rows[name] = slice(len(self._names), len(self._names) + len(draws))
                self._names += draws
        self._keys: tuple[tuple[int, int, range], Tensor] | None = None

    def __call__(
        self, images: Sequence[Tensor], indices: Tensor, *, seed: int, epoch: int, views: range
    ) -> tuple[Tensor, ...]:
        """float32 [B, C, size, size] for each of these views; images as in `MultiCrop`, of these views."""
        if self._keys is None or self._keys[0] != (seed, epoch, views):
            names = [name + view_suffix(view) for view in views for name in self._names]
            key = keys(seed, epoch, names, self.device).view(len(views), len(self._names), 2)
            self._keys = (seed, epoch, views), key
        return self._make(self._keys[1], images, indices).chunk(len(views))

    def compile(self) -> None:
        self._make = torch.compile(self._make, dynamic=False)  # type: ignore[method-assign]

    def _make(self, key: Tensor, images: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Keys [V, draws, 2] -> float32 [V * B, C, size, size], view by view."""
        spec, rows = self.spec, self._rows
        hashed = torch.cat([hashes(of_view, indices) for of_view in key], 1)
        pixels = torch.cat([*images] * (len(key) // len(images)))
        if "crop" in rows:
            height, width = pixels.shape[2:]
            boxes = crop_boxes(hashed[rows["crop"]], height, width, spec.scale, spec.ratio)
            whole, pixels = pixels, pixels.new_empty(*pixels.shape[:2], spec.size, spec.size)
            update(pixels, None, partial(bicubic_crop, size=spec.size), whole, *boxes)
        if "flip" in rows:
            flipped = self._chosen(hashed, "flip", 0.5)
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
        for layer in self._colours(hashed):
            photometric.apply(pixels, layer)
        if "blur" in rows:
            low, high = spec.blur_sigma
            sigma = low + (high - low) * uniform(hashed[rows["blur"]][1]).double()
            radius = min(math.ceil(BLUR_REACH * high), spec.size - 1)
            blurred = self._chosen(hashed, "blur", spec.blur)
            update(pixels, blurred, partial(gaussian_blur, radius=radius), pixels, sigma)
        if "solarize" in rows:
            chosen = self._chosen(hashed, "solarize", spec.solarize)
            photometric.apply(pixels, _layer(Operation.SOLARIZE, chosen, SOLARIZED_FROM))
        return to_float(pixels)

    def _chosen(self, hashed: Tensor, draw: str, probability: float) -> Tensor:
        """bool [V * B]: which views get an operation."""
        return uniform(hashed[self._rows[draw]][0]) < probability

    def _colours(self, hashed: Tensor) -> list[Layer]:
        """Colour jitter and greyscale."""
        layers: list[Layer] = []
        if self._jitter is not None:
            left_out = ~self._chosen(hashed, "jitter/whether", self.spec.jitter_probability)
            layers = [
                layer._replace(operation=layer.operation.masked_fill(left_out, Operation.IDENTITY.value))
                for layer in self._jitter.draw(hashed[self._rows["jitter"]])
            ]
        if "grey" in self._rows:  # no saturation
            layers.append(_layer(Operation.COLOR, self._chosen(hashed, "grey", self.spec.grey), 0.0))
        return layers


def _layer(operation: Operation, chosen: Tensor, argument: float) -> Layer:
    """The operation for the chosen samples, bool [B]."""
    return Layer(
        torch.where(chosen, operation.value, Operation.IDENTITY.value),
        torch.full(chosen.shape, argument, device=chosen.device),
        frozenset({operation}),
    )
