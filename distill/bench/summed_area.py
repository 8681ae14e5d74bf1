"""Area attention as its paper computes it, with every area in memory: the arm that the attention layer is measured
against, and an oracle of its tests.

Li et al. 2019, "Area Attention" (arXiv 1810.10126), section 3.3: cumulative sums over the grid, and the sum over
any box of tokens from its four corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6
"""Under the root of an area's variance."""


class AreaFeatures(NamedTuple):
    """Of every area [..., areas, d], by height, by width and row by row.

    The authors' code makes all three together, whichever of them it uses.
    """

    mean: Tensor
    deviation: Tensor
    total: Tensor


def summed_area_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    max_area: int | Sequence[int],
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """softmax(q . mean key / sqrt(d)) @ summed values over all areas: [B, heads, N, d] -> [B, heads, N, d].

    Args:
        max_area, grid, num_prefix_tokens: as for `distill.students.attention.area.area_attention`.
    """
    if isinstance(max_area, int):
        max_area, grid, num_prefix_tokens = (1, max_area), (1, key.shape[-2]), 0
    assert grid is not None, "boxes lie on a grid"
    keys, values = (_area_features(x[..., num_prefix_tokens:, :], grid, max_area) for x in (key, value))
    area_keys = torch.cat([key[..., :num_prefix_tokens, :], keys.mean], -2)
    area_values = torch.cat([value[..., :num_prefix_tokens, :], values.total], -2)
    logits = query @ area_keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1) @ area_values


def _area_features(x: Tensor, grid: tuple[int, int], max_area: Sequence[int]) -> AreaFeatures:
    """Tokens [..., height * width, d] -> their areas up to `max_area` (height, width)."""
    x = x.unflatten(-2, grid)
    table, squares_table = _summed_area_table(x), _summed_area_table(x.square())
    totals, squares, sizes = [], [], []
    for height in range(1, min(max_area[0], grid[0]) + 1):
        for width in range(1, min(max_area[1], grid[1]) + 1):
            totals.append(_box_sums(table, height, width))
            squares.append(_box_sums(squares_table, height, width))
            sizes.append(x.new_full((totals[-1].shape[-2], 1), height * width))
    total, size = torch.cat(totals, -2), torch.cat(sizes)
    mean = total / size
    variance = torch.cat(squares, -2) / size - mean.square()
    return AreaFeatures(mean, (variance.abs() + EPSILON).sqrt(), total)


def _summed_area_table(x: Tensor) -> Tensor:
    """[..., H, W, d] -> [..., H + 1, W + 1, d]: at (i, j) the sum of all rows before i and columns before j."""
    return F.pad(x.cumsum(-3).cumsum(-2), (0, 0, 1, 0, 1, 0))


def _box_sums(table: Tensor, height: int, width: int) -> Tensor:
    """[..., H + 1, W + 1, d] -> the sum over each height x width box, [..., boxes, d]."""
    below, above = table[..., height:, :, :], table[..., :-height, :, :]
    boxes = below[..., width:, :] - below[..., :-width, :] - above[..., width:, :] + above[..., :-width, :]
    return boxes.flatten(-3, -2)
