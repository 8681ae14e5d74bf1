"""Digests by which a student and its control are shown to have begun alike and seen the same."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from distill.data import Batch


def state_digest(module: nn.Module) -> str:
    """SHA-256 (hex) over names and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batch_digest(batch: Batch) -> str:
    """SHA-256 (hex) of what the student is about to see: indices, pixels and targets."""
    digest = hashlib.sha256()
    for part in (batch.indices, batch.images, batch.targets):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
