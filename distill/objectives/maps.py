"""What the methods on feature maps share: maps are [B, C, h, w], those of student and teacher in pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], float32: means over areas where it shrinks, bilinear where it grows."""
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps.float()
    if height >= size[0] and width >= size[1]:
        return F.adaptive_avg_pool2d(maps.float(), size)
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)


def spread(number: int, depth: int) -> list[int]:
    """The blocks, of `depth` many, after which `number` maps stand that are spread evenly, the last after the last."""
    return [-(-(place + 1) * depth // number) - 1 for place in range(number)]
