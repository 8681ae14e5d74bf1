"""Many small tensors as one vector, and back: one launch in place of one a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All values, one after the other."""
    return torch.cat([tensor if tensor.ndim == 1 else tensor.flatten() for tensor in tensors])


def shaped(tensors: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the shapes of `likes`."""
    pairs = zip(tensors, likes, strict=True)
    return [tensor if tensor.shape == like.shape else tensor.view(like.shape) for tensor, like in pairs]


def copy_joined(targets: Sequence[Tensor], values: Tensor) -> None:
    """Copy what `joined` gave, or values like it, into the tensors."""
    parts = values.split([target.numel() for target in targets])
    torch._foreach_copy_(list(targets), shaped(parts, targets))
