"""Areas of a token sequence, and pooling over them.

An area is a box of h x w adjacent tokens on the grid. Boxes are computed from shifted slices: the box of h x w is the
box of h x (w - 1) and one more column. Summed-area tables (Li et al. 2019, section 3.3) lose precision in differences
of large sums: in half precision they are off by 0.1 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to an area's variance, which is 0 for a single token (as in the paper's code)."""


class Areas(NamedTuple):
    """Prefix tokens, an area each, and all boxes up to `max_height` x `max_width` on a grid, in this order: by height,
    by width, and row by row.
    """

    height: int
    width: int
    max_height: int
    max_width: int
    prefix: int

    @classmethod
    def of(
        cls, tokens: int, max_area: int | Sequence[int], grid: tuple[int, int] | None = None, num_prefix_tokens: int = 0
    ) -> Areas:
        """The areas of `tokens` tokens.

        Args:
            max_area: an int: runs of that many tokens or fewer along the whole sequence, prefix tokens included (as
                in the paper). (height, width): boxes on `grid`, without the prefix tokens. Clipped to the sequence or
                grid.
        """
        if isinstance(max_area, int):
            height, width, max_height, max_width, prefix = 1, tokens, 1, max_area, 0
        else:
            if grid is None:
                raise ValueError(f"areas of {tuple(max_area)} lie on a grid: give grid=(height, width)")
            (height, width), (max_height, max_width), prefix = grid, max_area, num_prefix_tokens
            if prefix + height * width != tokens:
                raise ValueError(f"{prefix} prefix tokens and a grid of {height}x{width} are not {tokens} tokens")
        if min(max_height, max_width) < 1:
            raise ValueError(f"an area has at least one token, got max_area={max_area}")
        return cls(height, width, min(max_height, height), min(max_width, width), prefix)

    def sizes(self) -> list[tuple[int, int, int]]:
        """(height, width, number of such areas on the grid) in order, prefix tokens not counted."""
        return [
            (h, w, (self.height - h + 1) * (self.width - w + 1))
            for h in range(1, self.max_height + 1)
            for w in range(1, self.max_width + 1)
        ]

    @property
    def number(self) -> int:
        return self.prefix + sum(count for _, _, count in self.sizes())

    def on_grid(self, x: Tensor, dim: int) -> Tensor:
        """A view of x [..., tokens, ...] without the prefix tokens and with `dim` unfolded into (height, width)."""
        return x.narrow(dim, self.prefix, self.height * self.width).unflatten(dim, (self.height, self.width))

    def boxes(
        self, x: Tensor, dims: tuple[int, int], combine: Callable[[Tensor, Tensor], Tensor] = torch.add
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(h, w, x combined over every h x w box) in order; x has (height, width) at `dims` and the result
        (height - h + 1, width - w + 1). The 1 x 1 boxes are x itself."""
        rows, columns = dims
        tall = x
        for h in range(1, self.max_height + 1):
            if h > 1:
                tall = combine(tall.narrow(rows, 0, self.height - h + 1), x.narrow(rows, h - 1, self.height - h + 1))
            box = tall
            for w in range(1, self.max_width + 1):
                if w > 1:
                    kept = self.width - w + 1
                    box = combine(box.narrow(columns, 0, kept), tall.narrow(columns, w - 1, kept))
                yield h, w, box


def pool(x: Tensor, areas: Areas, mode: str) -> Tensor:
    """Tokens [..., tokens, d] -> areas [..., areas, d]; `mode` is 'mean', 'sum' or 'max' of an area's tokens."""
    if mode not in ("mean", "sum", "max"):
        raise ValueError(f"areas are pooled by mean, sum or max, not by '{mode}'")
    parts = [x.narrow(-2, 0, areas.prefix)]
    for h, w, box in areas.boxes(areas.on_grid(x, -2), (-3, -2), torch.maximum if mode == "max" else torch.add):
        parts.append((box / (h * w) if mode == "mean" else box).flatten(-3, -2))
    return torch.cat(parts, -2)


def standard_deviation(x: Tensor, areas: Areas) -> Tensor:
    """Tokens [..., tokens, d] -> sqrt(mean squared deviation + 1e-6) per area [..., areas, d], in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    grid = areas.on_grid(x, -2)
    variances = [torch.zeros_like(x.narrow(-2, 0, areas.prefix))]
    for h, w, box in areas.boxes(grid, (-3, -2)):
        mean = box / (h * w)
        squares = torch.zeros_like(mean)
        for i in range(h):
            for j in range(w):
                squares = squares + (grid[..., i : i + mean.shape[-3], j : j + mean.shape[-2], :] - mean).square()
        variances.append((squares / (h * w)).flatten(-3, -2))
    return (torch.cat(variances, -2) + STD_EPSILON).sqrt()


def pool_rows(x: Tensor, areas: Areas, mean: bool) -> Tensor:
    """Tokens [n, tokens, m] -> their mean or sum in every area [n, areas, m], without autograd."""
    tokens = x.shape[1]
    if areas.number == tokens:
        return x
    pooled = x.new_empty(x.shape[0], areas.number, x.shape[2])
    pooled.narrow(1, 0, tokens).copy_(x)
    for boxes, smaller, added, size in _made_of_smaller_boxes(pooled, areas):
        if mean:
            torch.lerp(smaller, added, 1 / size, out=boxes)
        else:
            torch.add(smaller, added, out=boxes)
    return pooled


def unpool_rows_(x: Tensor, areas: Areas, mean: bool) -> Tensor:
    """The transpose of `pool_rows`: areas [n, areas, m] -> tokens [n, tokens, m], in x's memory."""
    for boxes, smaller, added, size in reversed(list(_made_of_smaller_boxes(x, areas))):
        smaller.add_(boxes, alpha=1 - 1 / size if mean else 1)
        added.add_(boxes, alpha=1 / size if mean else 1)
    return x.narrow(1, 0, areas.prefix + areas.height * areas.width)


def _made_of_smaller_boxes(x: Tensor, areas: Areas) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Views of x [n, areas, m], in order: all boxes of one size [n, H', W', m]; the boxes without the last column (or,
    one column wide, the last row); these columns (rows); and how many of them a box has."""
    sizes: dict[tuple[int, int], Tensor] = {}
    start = areas.prefix
    for h, w, count in areas.sizes():
        height, width = areas.height - h + 1, areas.width - w + 1
        boxes = x.narrow(1, start, count).view(x.shape[0], height, width, x.shape[2])
        if w > 1:
            yield boxes, sizes[h, w - 1].narrow(2, 0, width), sizes[h, 1].narrow(2, w - 1, width), w
        elif h > 1:
            yield boxes, sizes[h - 1, 1].narrow(1, 0, height), sizes[1, 1].narrow(1, h - 1, height), h
        sizes[h, w] = boxes
        start += count


def coverage(areas: Areas) -> Tensor:
    """float32 [areas, tokens]: 1 where an area covers a token, in the order of the areas."""
    tokens = areas.prefix + areas.height * areas.width
    return pool(torch.eye(tokens)[None], areas, "sum")[0]
