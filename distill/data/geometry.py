"""Random boxes, crops and flips, batched with one box per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.randomness import integers, uniform

ATTEMPTS = 10
BOX_DRAWS = tuple(
    [f"area{attempt}" for attempt in range(ATTEMPTS)]
    + [f"ratio{attempt}" for attempt in range(ATTEMPTS)]
    + ["top", "left"]
)
# Full names, because these boxes are drawn on the device for data in memory, and in decoding workers for streams.
RESIZED_CROP_DRAWS = tuple(f"resized-crop/{draw}" for draw in BOX_DRAWS)


class Boxes(NamedTuple):
    """Each int64 [B], in pixels."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(
    hashed: Tensor, height: int, width: int, *, area: Sequence[float], ratio: Sequence[float], smaller_by: int = 0
) -> tuple[Boxes, Tensor]:
    """One box per sample of random area and aspect ratio, and whether one was found, bool [B].

    The fraction of the image's area is uniform in `area`, width over height log-uniform in `ratio`; the first of ten
    attempts that fits (each side at least `smaller_by` smaller than the image's) is placed uniformly, as in Szegedy et
    al. 2015 and torchvision's RandomResizedCrop. If none fits, the box is meaningless. `hashed`: [len(BOX_DRAWS), B].
    """
    area_share = area[0] + uniform(hashed[:ATTEMPTS]) * (area[1] - area[0])
    log_ratio = math.log(ratio[0]) + uniform(hashed[ATTEMPTS : 2 * ATTEMPTS]) * math.log(ratio[1] / ratio[0])
    pixels, aspect = area_share * (height * width), log_ratio.exp()
    widths, heights = (pixels * aspect).sqrt().round().long(), (pixels / aspect).sqrt().round().long()
    fits = (widths >= 1) & (widths <= width - smaller_by) & (heights >= 1) & (heights <= height - smaller_by)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    box_height = heights.gather(0, first)[0].clamp(1, height)
    box_width = widths.gather(0, first)[0].clamp(1, width)
    top = integers(hashed[-2], height - box_height + 1)
    left = integers(hashed[-1], width - box_width + 1)
    return Boxes(top, left, box_height, box_width), fits.any(0)


def crop_boxes(hashed: Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Boxes:
    """Boxes of a random resized crop, [B] each; without a fitting box, the largest central one of an allowed ratio."""
    boxes, found = random_boxes(hashed, height, width, area=scale, ratio=ratio)
    whole = width / height
    if whole < ratio[0]:
        central_height, central_width = round(width / ratio[0]), width
    elif whole > ratio[1]:
        central_height, central_width = height, round(height * ratio[1])
    else:
        central_height, central_width = height, width
    central = ((height - central_height) // 2, (width - central_width) // 2, central_height, central_width)
    return Boxes(*(torch.where(found, drawn, fixed) for drawn, fixed in zip(boxes, central, strict=True)))


def inside(boxes: Boxes, height: int, width: int) -> Tensor:
    """bool [B, 1, height, width]: which pixels lie in each sample's box."""
    rows = torch.arange(height, device=boxes.top.device)[None, :] - boxes.top[:, None]
    columns = torch.arange(width, device=boxes.top.device)[None, :] - boxes.left[:, None]
    in_rows = (rows >= 0) & (rows < boxes.height[:, None])
    in_columns = (columns >= 0) & (columns < boxes.width[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def shift_and_flip(images: Tensor, boxes: Boxes, padding: int, flip: Tensor | None) -> Tensor:
    """Crop boxes of the images' own size from the zero-padded images, then mirror where `flip`; exact.

    Images [B, C, H, W] of any dtype; boxes begin at -padding .. padding; flip bool [B] or None. A single gather,
    cheapest on uint8.
    """
    if not padding and flip is None:
        return images
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, -1)
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    if padding:
        images = F.pad(images, (padding, padding, padding, padding))
        rows, columns = rows + (boxes.top + padding)[:, None], columns + (boxes.left + padding)[:, None]
    flat = (rows[:, :, None] * images.shape[-1] + columns[:, None, :]).view(batch, 1, height * width)
    gathered = images.reshape(batch, channels, -1).gather(2, flat.expand(-1, channels, -1))
    return gathered.view(batch, channels, height, width)


def whole(images: Tensor) -> Boxes:
    """Boxes that cover images [B, C, H, W]."""
    start = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return Boxes(start, start, start + images.shape[2], start + images.shape[3])


def resized_crop(images: Tensor, boxes: Boxes, flip: Tensor | None) -> Tensor:
    """Each sample's box, resized bilinearly to the size of the images, then mirrored where `flip` (bool [B] or None):
    float32 [B, C, H, W] -> the same.

    A box is never larger than the image, so no antialiasing is needed. Coordinates are clamped to the box before
    sampling, so pixels outside it have no influence, as in torchvision's resized_crop (equal to 1e-5).
    """
    height, width = images.shape[-2:]

    def coordinates(start: Tensor, length: Tensor, size: int) -> Tensor:
        centres = (torch.arange(size, device=images.device) + 0.5) * (length / size)[:, None] - 0.5
        pixels = centres.clamp_min(0.0).minimum((length - 1)[:, None].to(centres.dtype)) + start[:, None]
        return pixels * (2 / size) + (1 / size - 1)

    x = coordinates(boxes.left, boxes.width, width)
    if flip is not None:  # mirrored coordinates give the mirrored image
        x = torch.where(flip[:, None], x.flip(1), x)
    y = coordinates(boxes.top, boxes.height, height)[:, :, None].expand(-1, -1, width)
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y), -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
