"""Windows of a grid with the keys of their queries, and where the biases of these are in focal attention's tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A grid in windows, and the keys of their queries."""

    height: int
    width: int
    prefix: int
    """Tokens before the grid's."""
    window: int
    expand: int
    focal_window: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.height * self.width

    @property
    def rows(self) -> int:
        """Of windows."""
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        return -(-self.width // self.window)

    def windows(self) -> Iterator[Window]:
        """Row by row."""
        for row, column in product(range(self.rows), range(self.columns)):
            queries, keys, near, pooled, coarse = [], [], [], [], []
            for index, side, count in ((row, self.height, self.rows), (column, self.width, self.columns)):
                first, focal = index * self.window, self.focal_window // 2
                queries.append(slice(first, min(first + self.window, side)))
                keys.append(slice(max(0, first - self.expand), min(side, first + self.window + self.expand)))
                near.append(_moved(keys[-1], self.expand - first))
                pooled.append(slice(max(0, index - focal), min(count, index + focal + 1)))
                coarse.append(_moved(pooled[-1], focal - index))
            yield Window(*((first, second) for first, second in (queries, keys, near, pooled, coarse)))


Rectangle = tuple[slice, slice]


class Window(NamedTuple):
    """Rectangles of rows and columns."""

    queries: Rectangle
    """Of the grid."""
    keys: Rectangle
    near: Rectangle
    """The same keys, counted from the first one that a window in the middle of a grid has."""
    pooled: Rectangle
    """Of the windows."""
    coarse: Rectangle
    """The same, counted from the first one that a window in the middle of a grid has."""

    def near_bias(self, bias: Tensor, window: int) -> Tensor:
        """Of all windows [heads, window^2, E, E] -> of this one [heads, queries, keys]."""
        return self.of_queries(bias, window)[..., *self.near].flatten(-2).flatten(1, 2)

    def coarse_bias(self, bias: Tensor, window: int) -> Tensor:
        """Of all windows [heads, window^2, f, f] -> of this one [heads, queries, pooled windows]."""
        return self.of_queries(bias, window)[..., *self.coarse].flatten(-2).flatten(1, 2)

    def of_queries(self, bias: Tensor, window: int) -> Tensor:
        high, wide = (span.stop - span.start for span in self.queries)
        return bias.unflatten(1, (window, window))[:, :high, :wide]


def _moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def _size(rectangle: Rectangle) -> int:
    high, wide = (span.stop - span.start for span in rectangle)
    return high * wide


def ring_offsets(window: int, expand: int) -> list[tuple[int, int]]:
    """Rows and columns of the keys in the ring, counted from the window's first token."""
    reach = range(-expand, window + expand)
    return [place for place in product(reach, reach) if not all(0 <= side < window for side in place)]


def near_index(window: int, expand: int) -> list[list[int]]:
    """[window^2, (window + 2 * expand)^2]: where the tables of window and ring, flat and one after the other, have the
    bias of a query and of a key in or around its window, each row by row."""
    side, reach, ring = 2 * window - 1, range(-expand, window + expand), ring_offsets(window, expand)
    number = {place: index for index, place in enumerate(ring)}
    rows = []
    for query, (row, column) in enumerate(product(range(window), repeat=2)):
        first = side**2 + query * len(ring)
        rows.append([
            first + number[y, x] if (y, x) in number else (row - y + window - 1) * side + column - x + window - 1
            for y, x in product(reach, reach)
        ])  # fmt: skip
    return rows


def coarse_index(window: int, focal_window: int) -> list[list[int]]:
    """[window^2, focal_window^2]: where the flat table of pooled windows has the bias of a query and a window."""
    focal, side = focal_window, window + focal_window - 1
    queries, keys = list(product(range(window), repeat=2)), list(product(range(focal), repeat=2))
    return [[(r - y + focal - 1) * side + c - x + focal - 1 for y, x in keys] for r, c in queries]


@cache
def dense_index(layout: Layout) -> Tensor:
    """int64 [N, N + windows]: where the three tables, flat and one after the other, have the bias of every query and
    every key, tokens and then pooled windows; after them, where there is none, and where there is no such key."""
    with torch.inference_mode(False):  # in evaluation too: it is kept for training
        return _dense_index(layout)


def _dense_index(layout: Layout) -> Tensor:
    window, focal = layout.window, layout.focal_window
    in_near = torch.tensor(near_index(window, layout.expand))
    at_coarse = (2 * window - 1) ** 2 + window**2 * len(ring_offsets(window, layout.expand))
    in_coarse = torch.tensor(coarse_index(window, focal)) + at_coarse
    nothing = at_coarse + (window + focal - 1) ** 2
    reach = window + 2 * layout.expand
    near, coarse = in_near.view(1, -1, reach, reach), in_coarse.view(1, -1, focal, focal)
    number = torch.arange(layout.prefix, layout.tokens).view(layout.height, layout.width)
    pooled = torch.arange(layout.rows * layout.columns).view(layout.rows, layout.columns) + layout.tokens
    index = torch.full((layout.tokens, layout.tokens + pooled.numel()), nothing + 1)
    index[: layout.prefix, : layout.tokens] = nothing
    index[:, : layout.prefix] = nothing
    for part in layout.windows():
        queries = number[part.queries].flatten()[:, None]
        index[queries, number[part.keys].flatten()] = part.near_bias(near, window)[0]
        index[queries, pooled[part.pooled].flatten()] = part.coarse_bias(coarse, window)[0]
    return index


@cache
def mean_keys(layout: Layout) -> float:
    """Of a query of the grid."""
    windows = list(layout.windows())
    keys = (_size(window.queries) * (_size(window.keys) + _size(window.pooled)) for window in windows)
    return sum(keys) / (layout.height * layout.width) + layout.prefix
