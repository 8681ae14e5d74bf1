"""Focal self-attention of windows of a grid (Yang et al. 2021, "Focal Self-attention for Local-Global Interactions in
Vision Transformers", arXiv 2107.00641), for the pyramid and for the flat vision transformer.

The queries of a window have these keys, under one softmax: the tokens of the window, the ring of tokens around it, and
the windows around it, its own included, pooled to one token each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.students.attention.area_pooling import Areas
from distill.students.attention.base import AttentionMaps, head_width
from distill.students.attention.cpu import attend, eager_on_cpu
from distill.students.attention.layout import Layout, coarse_index, dense_index, near_index, ring_offsets
from distill.students.attention.partition import from_windows, to_windows
from distill.students.attention.windows_cpu import attend_densely, attend_in_windows, is_faster_dense


class FocalWindows(nn.Module):
    """Parameters of focal attention, and the attention itself: tokens [B, P + h * w, dim] -> the same shape.

    The grid's borders are masked: windows have the keys that lie on the grid, each once. (In the published code ring
    keys wrap round to the opposite border, those in the corners of a ring are keys twice where its quarters overlap,
    and the padding of grids that are no multiple of the window is attended to.) A window that lies partly off the grid
    is pooled from the tokens that it has, with zeros in place of the others.

    A pooled token is an average of a window's tokens with learned weights, the same for all channels, at first
    1 / window^2, and a bias; `qkv` gives its key and value. An initialisation of all linear layers after this one would
    replace these weights by noise, as in the published code.
    """

    ring_offsets: Tensor
    near_index: Tensor
    coarse_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, window: int, expand: int, focal_window: int, *, qkv_bias: bool = True
    ) -> None:
        """
        Args:
            window: side of a window, in tokens.
            expand: width of the ring, in tokens.
            focal_window: side of the square of pooled windows, odd.
        """
        super().__init__()
        if window < 1 or expand < 0:
            raise ValueError(f"a window has at least one token and a ring no negative width, got {window} and {expand}")
        if focal_window < 1 or focal_window % 2 == 0:
            raise ValueError(f"pooled windows lie around the queries' own: an odd number a side, got {focal_window}")
        self.num_heads, self.head_dim = num_heads, head_width(dim, num_heads)
        self.window, self.expand, self.focal_window = window, expand, focal_window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        self.pool = nn.Linear(window**2, 1)
        ring = ring_offsets(window, expand)
        self.register_buffer("ring_offsets", torch.tensor(ring, dtype=torch.long).view(-1, 2))
        self.bias_window = nn.Parameter(torch.zeros(num_heads, 2 * window - 1, 2 * window - 1))
        self.bias_ring = nn.Parameter(torch.empty(num_heads, window**2, len(ring)))
        self.bias_coarse = nn.Parameter(torch.empty(num_heads, window + focal_window - 1, window + focal_window - 1))
        self.register_buffer("near_index", torch.tensor(near_index(window, expand)), persistent=False)
        self.register_buffer("coarse_index", torch.tensor(coarse_index(window, focal_window)), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.constant_(self.pool.weight, 1 / self.window**2)
        nn.init.zeros_(self.pool.bias)
        for table in (self.bias_ring, self.bias_coarse):
            nn.init.trunc_normal_(table, std=0.02)

    def attend(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, P + h * w, dim], the grid's row by row after P prefix tokens -> [B, P + h * w, dim].

        Prefix tokens are keys of all queries, without bias; their own queries see all tokens, and no pooled windows.
        """
        layout = self.layout(grid, x.shape[1])
        qkv, pooled = self.qkv(x), self._pooled(x[:, layout.prefix :], grid)
        qkv, pooled = (part.unflatten(-1, (-1, self.num_heads, self.head_dim)) for part in (qkv, pooled))
        if eager_on_cpu(x.device) and is_faster_dense(layout, len(x)):
            attended = attend_densely(qkv, pooled.flatten(1, 2), self.dense_bias(layout))
        else:
            windows = attend_in_windows if eager_on_cpu(x.device) else _attend_masked
            attended = windows(layout, qkv, pooled, *self._biases())
            if layout.prefix:
                attended = torch.cat([_attend_to_all(qkv, layout.prefix), attended], 1)
        return cast(Tensor, self.proj_drop(self.proj(attended.flatten(2))))

    def layout(self, grid: tuple[int, int], tokens: int) -> Layout:
        return Layout(*grid, tokens - grid[0] * grid[1], self.window, self.expand, self.focal_window)

    def _pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, h * w, dim] -> keys and values of the pooled windows [B, rows, columns, 2 * dim]."""
        rows, columns = (-(-side // self.window) for side in grid)
        tiles = to_windows(patches.unflatten(1, grid), self.window).unflatten(1, (rows, columns))
        # Not `self.pool(...)`, which would need a copy with the tokens last.
        pooled = (self.pool.weight @ tiles + self.pool.bias)[..., 0, :]
        dim = patches.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[dim:]
        return F.linear(pooled, self.qkv.weight[dim:], bias)

    def _biases(self) -> tuple[Tensor, Tensor]:
        """Of keys in and around a window [heads, window^2, E, E], E = window + 2 * expand, and of the pooled windows
        around it [heads, window^2, focal_window, focal_window]."""
        reach, focal = self.window + 2 * self.expand, self.focal_window
        near = torch.cat([self.bias_window.flatten(1), self.bias_ring.flatten(1)], 1)
        return (
            near[:, self.near_index].unflatten(-1, (reach, reach)),
            self.bias_coarse.flatten(1)[:, self.coarse_index].unflatten(-1, (focal, focal)),
        )

    def dense_bias(self, layout: Layout) -> Tensor:
        """The bias of every token's query and every key, tokens and then pooled windows, [heads, N, N + windows]; -inf
        where a query has not this key."""
        tables = [table.flatten(1) for table in (self.bias_window, self.bias_ring, self.bias_coarse)]
        others = tables[0].new_tensor([0.0, -math.inf]).expand(self.num_heads, -1)
        return torch.cat([*tables, others], 1)[:, dense_index(layout).to(others.device)]

    @torch.no_grad()
    def pooling_weights(self, grid: tuple[int, int]) -> Tensor:
        """What each of the grid's tokens weighs in each pooled window, [windows, h * w]."""
        layout = self.layout(grid, grid[0] * grid[1])
        weights = self.pool.weight.view(self.window, self.window)
        covered = weights.new_zeros(layout.rows * layout.columns, *grid)
        for index, window in enumerate(layout.windows()):
            high, wide = (span.stop - span.start for span in window.queries)
            covered[index][window.queries] = weights[:high, :wide]
        return covered.flatten(1)

    def maps_of(self, x: Tensor, grid: tuple[int, int], queries: int | None = None) -> AttentionMaps:
        """Of the first `queries` of tokens as `attend` has them, or of all. Keys: all tokens and, for the grid's
        queries, the pooled windows after them, which cover their tokens by the learned weights."""
        count, dim = x.shape[1], self.num_heads * self.head_dim
        prefix = count - grid[0] * grid[1]
        qkv = self.qkv(x)
        keys = torch.cat([qkv[..., dim : 2 * dim], self._pooled(x[:, prefix:], grid).flatten(1, 2)[..., :dim]], 1)
        query, key = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (qkv[:, :queries, :dim], keys)
        )
        logits = (query * self.head_dim**-0.5) @ key.transpose(-1, -2) + self.dense_bias(self.layout(grid, count))[
            :, :queries
        ]
        covered = F.pad(self.pooling_weights(grid), (prefix, 0))
        return AttentionMaps(logits.softmax(-1), torch.cat([torch.eye(count, device=x.device), covered]))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms: the tables of biases."""
        return {"bias_window", "bias_ring", "bias_coarse"}


def _attend_to_all(qkv: Tensor, queries: int) -> Tensor:
    """Plain attention of the first tokens of [B, N, 3, heads, d] -> [B, queries, heads, d]."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query = query[:, :, :queries]
    if eager_on_cpu(qkv.device):
        return attend(query, key, value, areas=Areas.of(qkv.shape[1], 1))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _attend_masked(layout: Layout, qkv: Tensor, pooled: Tensor, near: Tensor, coarse: Tensor) -> Tensor:
    """As `attend_in_windows`, by operators of all devices, compilers and exports: all windows have the same number of
    keys, and those that are not on the grid are masked."""
    batch, _, _, heads, head_dim = qkv.shape
    window, rows, columns = layout.window, layout.rows, layout.columns
    patches = qkv[:, layout.prefix :].unflatten(1, (layout.height, layout.width)).flatten(3)
    dim, groups = heads * head_dim, rows * columns
    query = to_windows(patches[..., :dim], window)
    keys = torch.cat(
        [
            *_neighbourhoods(patches[..., dim:], window, layout.expand, (rows, columns)),
            *_neighbourhoods(pooled.flatten(3), 1, layout.focal_window // 2, (rows, columns)),
            qkv[:, None, : layout.prefix, 1:].flatten(3).expand(-1, groups, -1, -1),
        ],
        2,
    )
    key, value = keys.unflatten(-1, (2, heads, head_dim)).unbind(3)
    query = query.unflatten(-1, (heads, head_dim))
    query, key, value = (
        part.transpose(2, 3).reshape(batch, groups * heads, -1, head_dim) for part in (query, key, value)
    )
    bias = torch.cat([_in_pieces(near, window), _in_pieces(coarse, 1)], -1)
    there = _keys_on_grid(layout, qkv.device)
    mask = bias.masked_fill(~there[:, None, None], -math.inf)
    mask = F.pad(mask, (0, layout.prefix)).flatten(0, 1)[None].to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, mask)
    attended = attended.view(batch, groups, heads, window**2, head_dim).transpose(2, 3).flatten(3)
    found = from_windows(attended, window, layout.height, layout.width)
    return found.unflatten(-1, (heads, head_dim)).flatten(1, 2)


def _keys_on_grid(layout: Layout, device: torch.device) -> Tensor:
    """bool [windows, keys]: which of the keys of `_attend_masked` but the prefix tokens there are."""
    counts, sides = (layout.rows, layout.columns), (layout.height, layout.width)
    found = []
    for step, expand, ends in ((layout.window, layout.expand, sides), (1, layout.focal_window // 2, counts)):
        offsets = torch.arange(-expand, step + expand, device=device)
        places = [torch.arange(count, device=device)[:, None] * step + offsets for count in counts]
        rows, columns = ((place >= 0) & (place < end) for place, end in zip(places, ends, strict=True))
        found.append(_in_pieces((rows[:, None, :, None] & columns[:, None]).flatten(0, 1), step))
    return torch.cat(found, 1)


def _neighbourhoods(x: Tensor, window: int, expand: int, counts: tuple[int, int]) -> Iterator[Tensor]:
    """The tokens of each window and within `expand` of it, zeros off the grid, in rectangular pieces: with copies of
    slices, whose gradients are cheaper than those of gathered or unfolded tokens.

    Args:
        x: [B, h, w, D].
        counts: windows from top to bottom and from left to right, [rows, columns].

    Yields:
        [B, rows * columns, tokens of this piece, D], together in the order of `_in_pieces`.
    """
    batch, height, width, channels = x.shape
    rows, columns = counts
    spans = _spans(window + 2 * expand, window)
    tall, wide = ((count + len(spans) - 1) * window for count in counts)
    padded = F.pad(x, (0, 0, expand, wide - expand - width, expand, tall - expand - height))
    tiles = padded.view(batch, rows + len(spans) - 1, window, columns + len(spans) - 1, window, channels)
    for (above, high), (before, broad) in product(enumerate(spans), repeat=2):
        piece = tiles[:, above : above + rows, :high, before : before + columns, :broad]
        yield piece.transpose(2, 3).reshape(batch, rows * columns, high * broad, channels)


def _in_pieces(x: Tensor, window: int) -> Tensor:
    """[..., E, E], of keys in and around a window row by row -> [..., E^2], piece by piece."""
    spans = _spans(x.shape[-1], window)
    return torch.cat([piece.flatten(-2) for band in x.split(spans, -2) for piece in band.split(spans, -1)], -1)


def _spans(reach: int, window: int) -> list[int]:
    """`reach` in pieces of a window's length, the last one maybe shorter."""
    return [min(window, reach - start) for start in range(0, reach, window)]
