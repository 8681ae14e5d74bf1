"""What running out of memory looks like."""

from __future__ import annotations

import traceback

import torch

# What torch's CPU allocator, CUDA, cuBLAS, cuDNN, the C++ library and oneDNN say; only CUDA's caching allocator has a
# class for it.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
ONEDNN = ("could not create a primitive", "could not execute a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the lack of memory, of whatever kind."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (text in ONEDNN or any(sign in text for sign in SIGNS))


def forget(error: BaseException) -> None:
    """Let go of what the functions that failed still hold."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
