"""Arithmetic on a GPU: `train.deterministic`, bit-for-bit reproducible results, which a CPU always has; and no TF32."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

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


def use_full_float32() -> None:
    """Compute float32 as float32 on CUDA, not as TF32, which torch allows in convolutions: then evaluations agree with
    those of a CPU. Who wants speed trains in bf16.
    """
    allow_tf32({"matmul": False, "convolution": False})


def allow_tf32(allowed: Mapping[str, bool]) -> None:
    """Let torch compute float32 as TF32, or not, by kind of operation."""
    with warnings.catch_warnings():  # torch 2.9 has another interface, and inductor still reads this one
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = allowed["matmul"]
        torch.backends.cudnn.allow_tf32 = allowed["convolution"]


def allowed_tf32() -> dict[str, bool]:
    """Whether torch may compute float32 as TF32, by kind of operation."""
    with warnings.catch_warnings():  # as above
        warnings.simplefilter("ignore")
        return {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32}
