"""Results that repeat bit for bit on a GPU; on a CPU with the same number of threads they always do."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """Restrict torch to deterministic algorithms (operations without one raise), or lift that restriction.

    Call it before the first matrix product: cuBLAS reads its setting when it starts. Nothing that torch refuses under
    `use_deterministic_algorithms` is used here: images are resized, moved and rotated without gradients, and global
    pooling is a mean.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        torch.backends.cudnn.deterministic = wanted
    # New memory filled with NaN is for finding bugs, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
