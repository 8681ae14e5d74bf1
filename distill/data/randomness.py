"""Stateless randomness: a hash of (seed, epoch, name of the draw, sample index).

A sample's draws are the same on every process and device and in every micro-batch, and there is no state to save. The
hash is integer arithmetic: a 32-bit finalizer (the two-round xor-shift-multiply of C. Wellons' hash-prospector) applied
twice, each time with its own key word. For one key it is a bijection of the index, so an epoch's order has no ties.

All hashes are int64 tensors with values in [0, 2**32).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Below 2**31, so that products with 32-bit values do not overflow an int64.
MULTIPLIER_1, MULTIPLIER_2 = 0x21F0AAAD, 0x735A2D97
GOLDEN = 0x9E3779B9


def mix(value: Tensor) -> Tensor:
    """A bijection of [0, 2**32) in which every input bit flips every output bit with probability about 1/2."""
    value = ((value ^ (value >> 16)) * MULTIPLIER_1) & MASK
    value = ((value ^ (value >> 15)) * MULTIPLIER_2) & MASK
    return value ^ (value >> 15)


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 16)) * MULTIPLIER_1) & MASK
    value = ((value ^ (value >> 15)) * MULTIPLIER_2) & MASK
    return value ^ (value >> 15)


def keys(seed: int, epoch: int, names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """[len(names), 2]: the key of each named draw, independent of the other names.

    Copies to the device, which synchronises CUDA: call it once an epoch, not in every batch.
    """
    rows = []
    for name in names:
        row = []
        for salt in (1, 2):
            state = salt
            for word in (zlib.crc32(name.encode()), seed & MASK, seed >> 32, epoch):
                state = _mix_int((state + GOLDEN + word) & MASK)
            row.append(state)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2)


def view_suffix(view: int) -> str:
    """What a view's draws are named by, besides their names; the first view has the plain names."""
    return f"/view{view}" if view else ""


def hashes(key: Tensor, indices: Tensor) -> Tensor:
    """Keys [S, 2] and sample indices [B] (int64, at least 0, below 2**32) -> hashes [S, B]."""
    return mix(mix((indices + key[:, :1]) & MASK) ^ key[:, 1:])


def uniform(hashed: Tensor) -> Tensor:
    """float32 in [0, 1), any shape: the upper 24 bits, which a float32 holds exactly."""
    return (hashed >> 8).to(torch.float32) * 2.0**-24


def integers(hashed: Tensor, bound: Tensor | int) -> Tensor:
    """int64 in [0, bound), any shape: the upper word of hash times bound (bias below bound / 2**32); bound in 1 ..
    2**31.
    """
    return (hashed * bound) >> 32


def look_up(table: Tensor, hashed: Tensor) -> Tensor:
    """Inverse transform sampling, any shape: the upper bits of the hash index a table of 2**n quantiles."""
    bits = table.numel().bit_length() - 1
    return table.index_select(0, (hashed >> (32 - bits)).reshape(-1)).view(hashed.shape)


def permutation(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of an epoch, int64 [count]: the indices sorted by their hash."""
    hashed = hashes(keys(seed, epoch, ["order"], device), torch.arange(count, device=device))[0]
    return torch.argsort(hashed, stable=True)


@lru_cache(maxsize=8)
def normal_table(bits: int = 16) -> Tensor:
    """float32 [2**bits] on the CPU: the standard normal's quantiles at (k + 1/2) / 2**bits, for `look_up`."""
    return torch.special.ndtri(_midpoints(bits)).to(torch.float32)


@lru_cache(maxsize=8)
def beta_table(alpha: float, bits: int = 12) -> Tensor:
    """float32 [2**bits] on the CPU, in [0, 1]: quantiles of Beta(alpha, alpha) at (k + 1/2) / 2**bits, for `look_up`.

    A table, because a draw must be a function of one hash. The distribution is symmetric: its lower half is integrated
    numerically over g in [0, 1] with x = g**q / 2, where q = max(1, 2 / alpha) removes the pole at 0. Errors of the
    quantiles are below 1e-4 for alpha from 0.05 to 100.
    """
    assert alpha > 0
    cells = 1 << 16
    power = max(1.0, 2.0 / alpha)
    edges = np.linspace(0.0, 1.0, cells + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    x = middle**power / 2
    # In logarithms: x underflows for small alpha and the density does for large ones.
    log_x = power * np.log(middle) - np.log(2.0)
    log_density = (alpha - 1) * (log_x + np.log1p(-x)) + (power - 1) * np.log(middle)
    cumulative = np.concatenate([[0.0], np.cumsum(np.exp(log_density - log_density.max()))])
    lower_half = _midpoints(bits)[: 1 << (bits - 1)].numpy()
    lower = np.interp(lower_half, cumulative / (2 * cumulative[-1]), edges) ** power / 2
    return torch.from_numpy(np.concatenate([lower, 1.0 - lower[::-1]])).to(torch.float32)


def _midpoints(bits: int) -> Tensor:
    return (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits)
