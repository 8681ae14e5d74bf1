"""Running out of memory: what it looks like, and what to set when it happens."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.data import BatchPlan
from distill.errors import RunFailed
from distill.recipe import Recipe

# What torch's CPU allocator, CUDA, cuBLAS, cuDNN, the C++ library and oneDNN say; only CUDA's caching allocator has a
# class for it.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
ONEDNN = ("could not create a primitive", "could not execute a primitive")
_log = logging.getLogger("distill")


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


@contextmanager
def advising(recipe: Recipe, plan: BatchPlan, paired: bool) -> Iterator[None]:
    """Within, the lack of memory ends in the settings to try next.

    Args:
        paired: samples are mixed in pairs.

    Raises:
        RunFailed: the memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _log.info("out of memory: %s", str(error).partition("\n")[0])
        forget(error)
        raise RunFailed(_advice(recipe, plan, paired)) from None


def _advice(recipe: Recipe, plan: BatchPlan, paired: bool) -> str:
    happened = f"out of memory with {plan.micro_batch} images at a time."
    share = plan.micro_batch * plan.accumulation
    smaller = [
        accumulation
        for accumulation in range(plan.accumulation + 1, share + 1)
        if share % accumulation == 0 and not (paired and share // accumulation % 2)
    ]
    if smaller:
        setting = f"train.gradient_accumulation={smaller[0]}"
        stays = f"; train.batch_size stays {plan.batch_size}."
        if comparing := dict.fromkeys(method.method for method in recipe.distill if method.needs.compares_samples):
            stays += f" {', '.join(comparing)}: comparing fewer samples at a time, the loss changes."
    elif not recipe.train.gradient_checkpointing:
        setting, stays = "train.gradient_checkpointing=true", "."
    else:
        return f"{happened}\nTake a smaller student, teacher or data.resolution, or a device with more memory."
    return f"{happened}\nSet {setting}{stays} --resume accepts it, and --dry-run tells in seconds whether it fits."
