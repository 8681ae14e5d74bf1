"""Results that repeat bit for bit on a GPU. On a CPU they do anyway, with as many threads."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """Have torch take only algorithms that repeat, and refuse the operations that have none; or let it choose.

    To be called before the first matrix product: cuBLAS reads its setting when it starts. torch lists what is refused
    under `use_deterministic_algorithms`. Of that, nothing is in this project: images are resized, moved and rotated
    without gradients, and global pooling is a mean.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        torch.backends.cudnn.deterministic = wanted
    # New memory filled with NaN is for finding bugs, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
