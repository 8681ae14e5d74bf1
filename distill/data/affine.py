"""Affine moves of images, composed and then carried out by one bilinear resampling.

Every device arrives at the same bytes, because floats are never rounded on the way: moves are whole numbers, and places
are multiples of 2**-PLACE_BITS pixels, so that bilinear weights have 16 bits and their products with grey levels 24,
which a float32 holds exactly.

A move is int64 [2, 3] in units of 2**-MOVE_BITS: it takes a place (x, y, 1) of the result, in pixels with centres at
.5, to the place of the image that is shown there, as in PIL's Image.transform.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MOVE_BITS = 22
PLACE_BITS = 8


def fixed(matrices: np.ndarray) -> Tensor:
    """float64 [..., 2, 3] -> moves, int64 of the same shape, on the CPU."""
    return torch.from_numpy(np.rint(np.ldexp(matrices, MOVE_BITS)).astype(np.int64))


def compose(moves: Tensor) -> Tensor:
    """Moves [L, B, 2, 3] in the order in which an image goes through them -> the one [B, 2, 3] that does all of it."""
    total = moves[0]
    for move in moves[1:]:
        product = (total[:, :, :2, None] * move[:, None]).sum(2)
        product = (product + (1 << (MOVE_BITS - 1))) >> MOVE_BITS
        product[:, :, 2] += total[:, :, 2]
        total = product
    return total


def mirror(moves: Tensor, flip: Tensor, width: int) -> Tensor:
    """Moves [B, 2, 3], those of a sample with `flip` (bool [B]) on the image mirrored left to right before."""
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
    """Cut each sample's box out of an image with black all around it, resize it to the size of the images, then move
    it: uint8 [B, C, H, W] -> the same, rounded.

    Boxes int64 [B] each; moves [B, 2, 3]; fill uint8 [C]. The frame of the moves is the box, as when it is cut out
    first: a pixel whose centre comes from outside it gets `fill`, any other is bilinear with its neighbours clamped
    to the box (PIL's rules). Where that comes to whole pixels the result is exact.
    """
    rows, columns = images.shape[-2:]
    # Sides of powers of 2 make grid_sample's coordinates exact; the black beyond them is its padding.
    powers = [1 << (side - 1).bit_length() for side in (rows, columns)]
    canvas = F.pad(images, (0, powers[1] - columns, 0, powers[0] - rows)).float()
    x, beside = _places(moves[:, 0], left, width, columns, rows, columns, powers[1])
    y, above = _places(moves[:, 1], top, height, rows, rows, columns, powers[0])
    grid = torch.stack((x, y), -1)
    result = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where((beside | above)[:, None], fill[:, None, None], result.round_().to(torch.uint8))


def _places(
    move: Tensor, start: Tensor, side: Tensor, size: int, rows: int, columns: int, power: int
) -> tuple[Tensor, Tensor]:
    """One coordinate of where each pixel comes from, float32 [B, rows, columns], clamped to the centres of the box's
    pixels, as grid_sample counts it for `power` pixels; and whether that was outside of the box.

    `move` [B, 3] is that coordinate's line of the moves; a box's `side` from `start`, int64 [B], becomes `size` in
    the result.
    """
    move = (move * side[:, None] + size // 2).div(size, rounding_mode="floor")
    # An odd number of half pixels, hence one bit more to shift away.
    shift = MOVE_BITS + 1 - PLACE_BITS
    halves_x, halves_y = (2 * torch.arange(count, device=move.device) + 1 for count in (columns, rows))
    across = (halves_x * move[:, :1] + (1 << (shift - 1))) >> shift
    down = (halves_y * move[:, 1:2] + 2 * move[:, 2:] + (1 << (shift - 1))) >> shift
    pixel = 2.0**-PLACE_BITS
    place = (across.float() * pixel)[:, None, :] + (down.float() * pixel)[:, :, None]
    end = side.float()[:, None, None]
    outside = (place < 0) | (place >= end)
    place = place.clamp_(min=0.5).minimum(end - 0.5).add_(start.float()[:, None, None])
    return place.mul_(2 / power).sub_(1), outside
