"""Helpers for accuracy in half precision and for finite gradients at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 unchanged."""
    return values if values.dtype == torch.float64 else values.float()


def divisor(lengths: Tensor) -> Tensor:
    """Lengths with 1 in place of 0: zero vectors divided by it stay zero, with finite gradients."""
    return torch.where(lengths > 0, lengths, 1)
