"""What keeps the methods accurate in half precision and their gradients finite where something is zero."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return values if values.dtype == torch.float64 else values.float()


def divisor(lengths: Tensor) -> Tensor:
    """Lengths as they are, 1 for those that are 0: a vector of zeros stays one when divided by its length, and its
    gradient is finite.
    """
    return torch.where(lengths > 0, lengths, 1)
