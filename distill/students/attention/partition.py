"""Windows of maps [B, h, w, C]: square pieces, row by row; maps are padded at the bottom and on the right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, h, w, C] -> [B, windows, window * window, C], padded with zeros."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window), -(-width // window)
    if (rows * window, columns * window) != (height, width):
        x = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(batch, rows * columns, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """[B, windows, window * window, C] -> [B, height, width, C], the inverse of `to_windows`."""
    batch, _, _, channels = x.shape
    rows, columns = -(-height // window), -(-width // window)
    x = x.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(batch, rows * window, columns * window, channels)
    return x[:, :height, :width]


def padding(height: int, width: int, window: int, device: torch.device) -> Tensor | None:
    """bool [windows, window * window]: places beyond the map; None: there are none."""
    if height % window == 0 and width % window == 0:
        return None
    inside = torch.ones(1, height, width, 1, device=device)
    return to_windows(inside, window)[0, :, :, 0] == 0


def offsets(window: int) -> Tensor:
    """int64 [window * window, window * window]: of each query and key of a window, the place of their offset in a table
    [2 * window - 1, 2 * window - 1] at query - key + window - 1, both row by row."""
    place = torch.arange(window)
    apart = place[:, None] - place[None, :] + window - 1
    rows, columns = apart[:, None, :, None], apart[None, :, None, :]
    return (rows * (2 * window - 1) + columns).flatten(0, 1).flatten(1, 2)
