"""Batched augmentation on the device, with independent random draws per sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distill.data import photometric
from distill.data.affine import mirror, resample
from distill.data.geometry import (
    BOX_DRAWS,
    RESIZED_CROP_DRAWS,
    Boxes,
    crop_boxes,
    inside,
    random_boxes,
    resized_crop,
    shift_and_flip,
    whole,
)
from distill.data.mixing import PAIR_DRAWS, SAMPLE_DRAWS, mix_pairs, one_hot
from distill.data.policies import Operations, around_moves
from distill.data.randomness import (
    GOLDEN,
    MASK,
    beta_table,
    hashes,
    integers,
    keys,
    mix,
    normal_table,
    uniform,
    view_suffix,
)
from distill.data.rows import update
from distill.recipe import Augment

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
NOISE_BITS = 10
ERASE_DRAWS = (*(f"erase/{draw}" for draw in BOX_DRAWS), "erase/whether", "erase/noise")


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1], the same values on every device."""
    if images.device.type != "cuda":
        return images.to(torch.float32).div_(255)
    # CUDA multiplies by the reciprocal of 255: in float32 most values are a bit off then, in float64 none of those that
    # are left after rounding.
    return images.to(torch.float64).div_(255).to(torch.float32)


class Augmenter:
    """Raw images -> augmented images and soft targets; a pure function of (seed, epoch, sample indices, view).

    A sample's result depends on its own index and, when pairs are mixed, on that of the pair's first sample, not on the
    rest of the batch. Order: pad-and-crop or random resized crop, flip, RandAugment or TrivialAugment, colour jitter,
    erasing, mixup or CutMix. `mean` and `std` (per channel, of images in [0, 1]) define the noise of erasing; `mean` is
    also the fill colour of moves (rotation, shear, translation). `cropped`: images are random resized crops already.

    Operations are applied in the order drawn, on uint8, but all moves of a sample are one resampling, at the position
    of its last move. Three differences to timm follow. The second of two moves can bring back what the first moved out
    of the frame, where timm has the fill colour. A colour operation between two moves sees the image before the first.
    After a random resized crop, which is part of the resampling, all colour operations come after all moves, and also
    change the fill colour.
    """

    def __init__(
        self,
        spec: Augment,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        cropped: bool = False,
    ) -> None:
        self.spec = spec
        self.num_classes = num_classes
        self.device = device
        self.paired = bool(spec.mixup or spec.cutmix)
        self.unmixed: bool | None = None
        """Whether pairs are left unmixed now; None: by the epoch, from `mix_off_epoch` on."""
        self._compiled = False
        self._crop = None if cropped else spec.random_resized_crop
        self._fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8, device=device)
        self._operations = Operations(spec, device)
        self._mixup = beta_table(spec.mixup).to(device) if spec.mixup else None
        self._cutmix = beta_table(spec.cutmix).to(device) if spec.cutmix else None
        normal = normal_table(NOISE_BITS)
        # N(0, 1) after normalisation by the data's statistics, clamped to [0, 1].
        self._noise = torch.stack([(m + s * normal).clamp(0.0, 1.0) for m, s in zip(mean, std, strict=True)]).to(device)
        self._rows: dict[str, slice] = {}
        self._names: list[str] = []
        self._name("crop", ("crop/y", "crop/x"), when=bool(spec.crop_padding))
        self._name("resized-crop", RESIZED_CROP_DRAWS, when=self._crop is not None)
        self._name("flip", ("flip",), when=spec.hflip)
        self._name("operations", self._operations.draws, when=bool(self._operations.draws))
        self._name("erase", ERASE_DRAWS, when=bool(spec.random_erasing))
        self._name("sample", SAMPLE_DRAWS, when=self.paired)
        self._name("pair", PAIR_DRAWS, when=self.paired)
        self._keys: tuple[tuple[int, int], list[Tensor]] | None = None
        self._position_hashes = torch.empty(0, 0, dtype=torch.int64, device=device)

    def _name(self, group: str, draws: Sequence[str], when: bool) -> None:
        if when:
            self._rows[group] = slice(len(self._names), len(self._names) + len(draws))
            self._names += draws

    def _epoch_keys(self, seed: int, epoch: int, view: int) -> Tensor:
        if self._keys is None or self._keys[0] != (seed, epoch):
            self._keys = (seed, epoch), []
        of_views = self._keys[1]
        while len(of_views) <= view:  # each view has its own draws
            suffix = view_suffix(len(of_views))
            of_views.append(keys(seed, epoch, [name + suffix for name in self._names], self.device))
        return of_views[view]

    def __call__(
        self, images: Tensor, labels: Tensor, indices: Tensor, *, seed: int, epoch: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        """uint8 [B, C, H, W], int64 [B], int64 [B] -> float32 [B, C, H, W] in [0, 1], float32 [B, num_classes]."""
        self._operations.prepare(*images.shape[2:])
        self._prepare_noise(*images.shape[1:])
        off = 0 < self.spec.mix_off_epoch <= epoch if self.unmixed is None else self.unmixed
        mixed = None
        if self.paired and (self._compiled or not off):  # a tensor: switching off compiles nothing anew
            mixed = torch.full((), 0.0 if off else self.spec.mix_probability, device=self.device)
        return self._augment(self._epoch_keys(seed, epoch, view), images, labels, indices, mixed)

    def compile(self) -> None:
        """Compile from the next call on, to fuse hundreds of kernels; for a GPU and batches of one size."""
        self._compiled = True
        self._augment = torch.compile(self._augment, dynamic=False)  # type: ignore[method-assign]

    def _augment(
        self, key: Tensor, images: Tensor, labels: Tensor, indices: Tensor, mixed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`mixed`: the probability that a pair is mixed, float32 []; None: none is."""
        hashed = hashes(key, indices)
        rows = self._rows
        flip = uniform(hashed[rows["flip"]][0]) < 0.5 if "flip" in rows else None
        boxes = self._boxes(hashed, images)
        if "operations" in rows:
            floats = to_float(self._operated(images, boxes, flip, hashed[rows["operations"]]))
        elif self._crop is not None:
            floats = resized_crop(to_float(images), boxes, flip)
        else:
            floats = to_float(shift_and_flip(images, boxes, self.spec.crop_padding, flip))
        if "erase" in rows:
            floats = self._erase(floats, hashed[rows["erase"]])
        targets = one_hot(labels, self.num_classes)
        if mixed is not None:
            pair_hashes = hashes(key[rows["pair"]], indices[::2])
            floats, targets = mix_pairs(
                floats,
                targets,
                hashed[rows["sample"]],
                pair_hashes,
                mixup=self._mixup,
                cutmix=self._cutmix,
                probability=mixed,
                switch=self.spec.mix_switch,
            )
        return floats, targets

    def _boxes(self, hashed: Tensor, images: Tensor) -> Boxes:
        """The crop box of each image; with padding it may begin outside."""
        if self._crop is not None:
            drawn, (height, width) = hashed[self._rows["resized-crop"]], images.shape[2:]
            return crop_boxes(drawn, height, width, self._crop.scale, self._crop.ratio)
        boxes = whole(images)
        if padding := self.spec.crop_padding:
            top, left = integers(hashed[self._rows["crop"]], 2 * padding + 1) - padding
            boxes = boxes._replace(top=top, left=left)
        return boxes

    def _operated(self, images: Tensor, boxes: Boxes, flip: Tensor | None, hashed: Tensor) -> Tensor:
        """Crop, flip and drawn operations: uint8 [B, C, H, W] -> the same, not in place."""
        layers, moves, moving = self._operations.draw(hashed)
        resampled = partial(resample, fill=self._fill)
        if self._crop is not None:
            result = torch.empty_like(images)
            moved = moves if flip is None else mirror(moves, flip, images.shape[3])
            update(result, None, resampled, images, moved, *boxes)
        else:
            # A shift by whole pixels: no resampling yet.
            result = shift_and_flip(images, boxes, self.spec.crop_padding, flip)
            result = result.clone() if result is images else result
            before, layers = around_moves(layers)
            for layer in before:
                photometric.apply(result, layer)
            if moving is not None:
                update(result, moving, resampled, result, moves, *whole(result))
        for layer in layers:
            photometric.apply(result, layer)
        return result

    def _erase(self, images: Tensor, hashed: Tensor) -> Tensor:
        """In place: noise in a random box (Zhong et al. 2017, with the areas and ratios of timm's 'pixel' mode)."""
        height, width = images.shape[-2:]
        boxes, found = random_boxes(
            hashed[: len(BOX_DRAWS)], height, width, area=ERASED_AREA, ratio=ERASED_RATIO, smaller_by=1
        )
        erased = found & (uniform(hashed[-2]) < self.spec.random_erasing)
        update(images, erased, self._noisy, images, hashed[-1], *boxes)
        return images

    def _noisy(self, images: Tensor, hashed: Tensor, *boxes: Tensor) -> Tensor:
        mask = inside(Boxes(*boxes), *images.shape[-2:])
        return torch.where(mask, self._pixels(hashed, images.shape), images)

    def _prepare_noise(self, channels: int, height: int, width: int) -> None:
        """Compute the position hashes of `_pixels`, [channels / 3, H * W], outside of the compiled code: inductor does
        index arithmetic in 32 bits on a GPU, where this product overflows.
        """
        groups, pixels = -(-channels // 3), height * width
        if self._position_hashes.shape != (groups, pixels):
            first = 3 * torch.arange(groups, device=self.device)[:, None]
            self._position_hashes = (torch.arange(pixels, device=self.device) + first * pixels) * GOLDEN & MASK

    def _pixels(self, hashed: Tensor, shape: torch.Size) -> Tensor:
        """Noise for every pixel, float32 of `shape` in [0, 1]. One 32-bit hash of (sample, position) is used for three
        channels, 10 bits each.
        """
        batch, channels, height, width = shape
        noise = torch.empty(shape, device=hashed.device)
        for first in range(0, channels, 3):
            words = mix((hashed[:, None] + self._position_hashes[first // 3]) & MASK)
            for channel in range(first, min(first + 3, channels)):
                entries = (words >> (NOISE_BITS * (channel - first))) & ((1 << NOISE_BITS) - 1)
                values = self._noise[channel].index_select(0, entries.view(-1))
                noise[:, channel] = values.view(batch, height, width)
        return noise
