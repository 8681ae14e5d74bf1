"""Focal self-attention of windows of a grid (Yang et al. 2021, "Focal Self-attention for Local-Global Interactions in
Vision Transformers", arXiv 2107.00641), for the pyramid and for the flat vision transformer.

The queries of a window have these keys, under one softmax: the tokens of the window, the ring of tokens around it, and
the windows around it, its own included, pooled to one token each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    bias_index: Tensor
    near_offsets: Tensor
    coarse_offsets: Tensor

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
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        if window < 1 or expand < 0:
            raise ValueError(f"a window has at least one token and a ring no negative width, got {window} and {expand}")
        if focal_window < 1 or focal_window % 2 == 0:
            raise ValueError(
                f"pooled windows are centred on the queries' own: an odd number a side, got {focal_window}"
            )
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.window, self.expand, self.focal_window = window, expand, focal_window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        self.pool = nn.Linear(window**2, 1)
        reach = range(-expand, window + expand)
        ring = [place for place in product(reach, reach) if not all(0 <= side < window for side in place)]
        self.register_buffer("ring_offsets", torch.tensor(ring, dtype=torch.long).view(-1, 2))
        self.bias_window = nn.Parameter(torch.zeros(num_heads, 2 * window - 1, 2 * window - 1))
        self.bias_ring = nn.Parameter(torch.empty(num_heads, window**2, len(ring)))
        coarse_side = window + focal_window - 1
        self.bias_coarse = nn.Parameter(torch.empty(num_heads, coarse_side, coarse_side))
        near = list(_offsets(window, expand))
        coarse = list(_offsets(1, focal_window // 2))
        self.register_buffer("near_offsets", torch.tensor(near), persistent=False)
        self.register_buffer("coarse_offsets", torch.tensor(coarse), persistent=False)
        self.register_buffer("bias_index", self._bias_index(near, ring, coarse), persistent=False)
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

    def _bias_index(
        self, near: Sequence[tuple[int, int]], ring: Sequence[tuple[int, int]], coarse: Sequence[tuple[int, int]]
    ) -> Tensor:
        """int64 [window^2, keys]: where the three tables, flat and one after the other, have the bias of a query and a
        key at these offsets."""
        window, focal = self.window, self.focal_window
        side, coarse_side = 2 * window - 1, window + focal - 1
        at_ring, at_coarse = side**2, side**2 + window**2 * len(ring)
        number = {place: index for index, place in enumerate(ring)}
        rows = []
        for query, (row, column) in enumerate(product(range(window), repeat=2)):
            found = [
                at_ring + query * len(ring) + number[key]
                if key in number
                else (row - key[0] + window - 1) * side + column - key[1] + window - 1
                for key in near
            ]
            shift = focal - 1 - focal // 2  # coarse offsets are counted from the own window
            found += [at_coarse + (row - key[0] + shift) * coarse_side + column - key[1] + shift for key in coarse]
            rows.append(found)
        return torch.tensor(rows)

    def attend(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, P + h * w, dim], the grid's row by row after P prefix tokens -> [B, P + h * w, dim].

        Prefix tokens are keys of all queries, without bias; their own queries see all tokens, and no pooled windows.
        """
        prefix = x.shape[1] - grid[0] * grid[1]
        qkv = self.qkv(x)
        windows = self._windows(qkv[:, prefix:].unflatten(1, grid), qkv[:, :prefix], self._pooled(x[:, prefix:], grid))
        attended = windows.flatten(1, 2)
        if prefix:
            attended = torch.cat([self._attend_to_all(qkv, prefix), attended], 1)
        return cast(Tensor, self.proj_drop(self.proj(attended)))

    def _attend_to_all(self, qkv: Tensor, queries: int) -> Tensor:
        """Plain attention of the first tokens: [B, N, 3 * dim] -> [B, queries, dim]."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query[:, :, :queries], key, value)
        return attended.transpose(1, 2).flatten(2)

    def _pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, h * w, dim] -> keys and values of the pooled windows [B, rows, columns, 2 * dim]."""
        tiles = _tiles(patches.unflatten(1, grid), self.window)
        pooled = self.pool(tiles.permute(0, 1, 3, 5, 2, 4).flatten(-2))[..., 0]
        dim = patches.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[dim:]
        return F.linear(pooled, self.qkv.weight[dim:], bias)

    def _windows(self, qkv: Tensor, prefix: Tensor, pooled: Tensor) -> Tensor:
        """Attention of the grid's queries.

        Args:
            qkv: [B, h, w, 3 * dim]; prefix: [B, P, 3 * dim]; pooled: keys and values [B, rows, columns, 2 * dim].

        Returns:
            [B, h, w, dim].
        """
        batch, height, width, _ = qkv.shape
        dim, window = self.num_heads * self.head_dim, self.window
        _, rows, columns, _ = pooled.shape
        groups = rows * columns
        query = _tiles(qkv[..., :dim], window).transpose(2, 3).reshape(batch, groups, window**2, dim)
        keys = [
            *neighbourhoods(qkv[..., dim:], window, self.expand, (rows, columns)),
            *neighbourhoods(pooled, 1, self.focal_window // 2, (rows, columns)),
            prefix[:, None, :, dim:].expand(-1, groups, -1, -1),
        ]
        key, value = torch.cat(keys, 2).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(3)
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        bias = self._bias(prefix.shape[1]) + self._mask(height, width, prefix.shape[1])[:, None, None].to(qkv.dtype)
        heads = (batch, groups * self.num_heads)
        attended = F.scaled_dot_product_attention(
            *(part.transpose(2, 3).reshape(*heads, -1, self.head_dim) for part in (query, key, value)),
            attn_mask=bias.flatten(0, 1)[None].to(query.dtype),
        )
        tiles = attended.view(batch, rows, columns, self.num_heads, window, window, self.head_dim)
        tiles = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * window, columns * window, dim)
        return tiles[:, :height, :width]

    def _bias(self, prefix: int) -> Tensor:
        """[heads, window^2, keys]"""
        tables = [self.bias_window, self.bias_ring, self.bias_coarse]
        bias = torch.cat([table.flatten(1) for table in tables], 1)[:, self.bias_index]
        return F.pad(bias, (0, prefix))

    def _mask(self, height: int, width: int, prefix: int) -> Tensor:
        """float32 [windows, keys]: 0 for a key that there is on this grid, else -inf."""
        rows, columns = -(-height // self.window), -(-width // self.window)
        near = _inside(self.near_offsets, self.window, (rows, columns), (height, width))
        coarse = _inside(self.coarse_offsets, 1, (rows, columns), (rows, columns))
        there = torch.cat([near, coarse], 1)
        return F.pad(torch.zeros_like(there, dtype=torch.float32).masked_fill(~there, -math.inf), (0, prefix))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms: the tables of biases."""
        return {"bias_window", "bias_ring", "bias_coarse"}


def neighbourhoods(x: Tensor, window: int, expand: int, counts: tuple[int, int]) -> Iterator[Tensor]:
    """The tokens of each window and within `expand` of it, zeros off the grid, in pieces of rectangles.

    Args:
        x: [B, h, w, D].
        counts: windows from top to bottom and from left to right, [rows, columns].

    Yields:
        [B, rows * columns, tokens of this piece, D], together in the order of `_offsets`.
    """
    batch, height, width, channels = x.shape
    rows, columns = counts
    spans = _spans(window, expand)
    tall, wide = ((count + len(spans) - 1) * window for count in counts)
    padded = F.pad(x, (0, 0, expand, wide - expand - width, expand, tall - expand - height))
    tiles = padded.view(batch, tall // window, window, wide // window, window, channels)
    for (above, high), (before, broad) in product(enumerate(spans), repeat=2):
        piece = tiles[:, above : above + rows, :high, before : before + columns, :broad]
        yield piece.transpose(2, 3).reshape(batch, rows * columns, high * broad, channels)


def _spans(window: int, expand: int) -> list[int]:
    """Lengths of the pieces, `window` but for the last, of the side of a window with its ring."""
    reach = window + 2 * expand
    return [min(window, reach - start) for start in range(0, reach, window)]


def _offsets(window: int, expand: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of the tokens of `neighbourhoods`, counted from a window's first token."""
    for (above, high), (before, broad) in product(enumerate(_spans(window, expand)), repeat=2):
        for row, column in product(range(high), range(broad)):
            yield above * window + row - expand, before * window + column - expand


def _tiles(x: Tensor, window: int) -> Tensor:
    """[B, h, w, D] -> [B, rows, window, columns, window, D], with zeros off the grid."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window), -(-width // window)
    padded = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
    return padded.view(batch, rows, window, columns, window, channels)


def _inside(offsets: Tensor, step: int, counts: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """bool [rows * columns, keys]: whether the keys at these offsets [keys, 2] from the first token of a window lie on
    a grid of these sides; there are rows x columns windows, `step` tokens apart."""
    along = []
    for axis, (count, side) in enumerate(zip(counts, sides, strict=True)):
        at = torch.arange(count, device=offsets.device)[:, None] * step + offsets[:, axis]
        along.append((at >= 0) & (at < side))
    return (along[0][:, None] & along[1][None]).flatten(0, 1)
