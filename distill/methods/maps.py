"""What the methods on feature maps share: maps are [B, C, h, w], those of student and teacher in pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from distill.methods.precision import at_least_float32


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], float32 or more: means over areas where it shrinks, bilinear where it grows."""
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
    """(block, map) as given, None being the last; or, where none are given, by `pairing`: all maps, spread evenly over
    the blocks, or the middle, or the last.

    Args:
        depth: number of the student's blocks.
        maps: names of the teacher's maps, from the first to the last; one that is given may be another.

    Raises:
        ValueError: a block that there is not.
    """
    if wrong := [block for block, _ in given if block is not None and block >= depth]:
        raise ValueError(f"the student has blocks 0 to {depth - 1}, got {wrong}")
    if given:
        return [(depth - 1 if block is None else block, maps[-1] if name is None else name) for block, name in given]
    if pairing == "all":
        return list(zip(spread(len(maps), depth), maps, strict=True))
    return [((depth - 1) // 2, maps[(len(maps) - 1) // 2]) if pairing == "middle" else (depth - 1, maps[-1])]


def spread(number: int, depth: int) -> list[int]:
    """The blocks, of `depth` many, after which `number` maps stand that are spread evenly, the last after the last."""
    return [-(-(place + 1) * depth // number) - 1 for place in range(number)]
