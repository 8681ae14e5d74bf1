"""Digests of weights and of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distill.data import Batch


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and bytes; the same whatever file or order the tensors came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def batch_digest(batch: Batch) -> str:
    """SHA-256 (hex) of what the student is about to see: indices, pixels and targets."""
    digest = hashlib.sha256()
    for part in (batch.indices, batch.images, batch.targets):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
