"""Affine transforms of images ("moves"), composed and applied by one bilinear resampling.

The result is the same on every device, because no float is rounded: moves are fixed-point integers, and coordinates are
multiples of 2**-COORDINATE_BITS pixels, so bilinear weights have 16 bits and their products with grey levels 24, which
a float32 holds exactly.

A move is int64 [2, 3] in units of 2**-MOVE_BITS. It maps output coordinates (x, y, 1), in pixels with centres at .5, to
input coordinates, as in PIL's Image.transform.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MOVE_BITS = 22
COORDINATE_BITS = 8


def fixed(matrices: np.ndarray) -> Tensor:
    """float64 [..., 2, 3] -> moves, int64 of the same shape, on the CPU."""
    return torch.from_numpy(np.rint(np.ldexp(matrices, MOVE_BITS)).astype(np.int64))


def compose(moves: Tensor) -> Tensor:
    """Moves [L, B, 2, 3] in the order of application -> their composition [B, 2, 3]."""
    total = moves[0]
    for move in moves[1:]:
        product = (total[:, :, :2, None] * move[:, None]).sum(2)
        product = (product + (1 << (MOVE_BITS - 1))) >> MOVE_BITS
        product[:, :, 2] += total[:, :, 2]
        total = product
    return total


def mirror(moves: Tensor, flip: Tensor, width: int) -> Tensor:
    """Moves [B, 2, 3], composed with a preceding horizontal flip of the image where `flip` (bool [B])."""
    mirrored = -moves[:, 0]
    mirrored[:, 2] += width << MOVE_BITS
    return torch.stack((torch.where(flip[:, None], mirrored, moves[:, 0]), moves[:, 1]), 1)


def resample(
    images: Tensor,
    moves: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    *,
    fill: Tensor,
) -> Tensor:
    """Crop each sample's box (black outside of the image), resize it to the size of the images, then move it: uint8
    [B, C, H, W] -> the same, rounded.

    Boxes int64 [B] each; moves [B, 2, 3]; fill uint8 [C]. As if the box were cropped first, a pixel whose centre maps
    outside of the box gets `fill`, any other is bilinear with its neighbours clamped to the box (PIL's rules). Shifts
    by whole pixels are exact.
    """
    rows, columns = images.shape[-2:]
    # Sides of powers of 2 make grid_sample's coordinates exact; the black beyond them is its padding.
    powers = [1 << (side - 1).bit_length() for side in (rows, columns)]
    canvas = F.pad(images, (0, powers[1] - columns, 0, powers[0] - rows)).float()
    x, beside = _coordinates(moves[:, 0], left, width, columns, rows, columns, powers[1])
    y, above = _coordinates(moves[:, 1], top, height, rows, rows, columns, powers[0])
    grid = torch.stack((x, y), -1)
    result = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where((beside | above)[:, None], fill[:, None, None], result.round_().to(torch.uint8))


def _coordinates(
    move: Tensor, start: Tensor, side: Tensor, size: int, rows: int, columns: int, power: int
) -> tuple[Tensor, Tensor]:
    """One input coordinate of each output pixel, float32 [B, rows, columns], clamped to the box's pixel centres, in
    grid_sample's units for `power` pixels; and whether it was outside of the box.

    `move` [B, 3] is that coordinate's row of the moves; a box's `side` from `start`, int64 [B], becomes `size`.
    """
    move = (move * side[:, None] + size // 2).div(size, rounding_mode="floor")
    # Pixel centres are odd numbers of half pixels, hence one bit more to shift.
    shift = MOVE_BITS + 1 - COORDINATE_BITS
    halves_x, halves_y = (2 * torch.arange(count, device=move.device) + 1 for count in (columns, rows))
    across = (halves_x * move[:, :1] + (1 << (shift - 1))) >> shift
    down = (halves_y * move[:, 1:2] + 2 * move[:, 2:] + (1 << (shift - 1))) >> shift
    pixel = 2.0**-COORDINATE_BITS
    coordinate = (across.float() * pixel)[:, None, :] + (down.float() * pixel)[:, :, None]
    end = side.float()[:, None, None]
    outside = (coordinate < 0) | (coordinate >= end)
    coordinate = coordinate.clamp_(min=0.5).minimum(end - 0.5).add_(start.float()[:, None, None])
    return coordinate.mul_(2 / power).sub_(1), outside
