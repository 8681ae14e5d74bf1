"""Resizing and pairing of feature maps [B, C, h, w] for methods on maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from distill.methods.precision import at_least_float32


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], in float32 at least: area means for smaller sizes, else bilinear."""
    maps = at_least_float32(maps)
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    if height >= size[0] and width >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def pairs_of(
    given: Sequence[tuple[int | None, str | None]], pairing: str, *, depth: int, maps: Sequence[str]
) -> list[tuple[int, str]]:
    """Pairs (block, map) as given, with None for the last; by default by `pairing`: all maps, spread evenly over the
    blocks, or the middle, or the last.

    Args:
        depth: number of the student's blocks.
        maps: the teacher's default maps, first to last; `given` may name others.

    Raises:
        ValueError: no such block.
    """
    if wrong := [block for block, _ in given if block is not None and block >= depth]:
        raise ValueError(f"the student has blocks 0 to {depth - 1}, got {wrong}")
    if given:
        return [(depth - 1 if block is None else block, maps[-1] if name is None else name) for block, name in given]
    if pairing == "all":
        return list(zip(spread(len(maps), depth), maps, strict=True))
    return [((depth - 1) // 2, maps[(len(maps) - 1) // 2]) if pairing == "middle" else (depth - 1, maps[-1])]


def spread(number: int, depth: int) -> list[int]:
    """`number` evenly spaced blocks out of `depth`, the last one included."""
    return [-(-(index + 1) * depth // number) - 1 for index in range(number)]
