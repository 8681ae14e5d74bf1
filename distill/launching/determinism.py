"""`train.deterministic`: bit-for-bit reproducible results on a GPU; on a CPU they always are."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """Restrict torch to deterministic algorithms (operations without one raise), or lift that restriction.

    Call it before the first matrix product: cuBLAS reads its setting when it starts. The code uses no operation that
    `use_deterministic_algorithms` refuses: augmentation needs no gradients, and global pooling is a mean.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        torch.backends.cudnn.deterministic = wanted
    # Filling new memory with NaN is for debugging, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
