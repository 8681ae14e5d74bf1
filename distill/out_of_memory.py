"""Detection of out-of-memory errors, and advice on settings."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.data import BatchPlan
from distill.errors import InputError, RunFailed
from distill.recipe import Recipe

# Messages of torch's CPU allocator, CUDA, cuBLAS, cuDNN, the C++ library and oneDNN; only CUDA's caching allocator has
# its own exception class.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
ONEDNN = ("could not create a primitive", "could not execute a primitive")
_log = logging.getLogger("distill")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (text in ONEDNN or any(sign in text for sign in SIGNS))


def release_frames(error: BaseException) -> None:
    """Release the tensors that the failed functions' frames refer to."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None


@contextmanager
def advising(recipe: Recipe, plan: BatchPlan, paired: bool) -> Iterator[None]:
    """Turn out-of-memory errors into advice on settings.

    Args:
        paired: samples are mixed in pairs.

    Raises:
        RunFailed: out of memory; the message has the setting to try next.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _log.info("out of memory: %s", str(error).partition("\n")[0])
        release_frames(error)
        raise RunFailed(_advice(recipe, plan, paired)) from None


def _advice(recipe: Recipe, plan: BatchPlan, paired: bool) -> str:
    problem = f"out of memory with {plan.micro_batch} images at a time."
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
        return f"{problem}\nTake a smaller student, teacher or data.resolution, or a device with more memory."
    return f"{problem}\nSet {setting}{stays} --resume accepts it, and --dry-run shows in seconds whether it fits."


class _Bounded(TorchDispatchMode):
    """Counts operations, and the values of tensors that are made of no other, before memory is taken for them."""

    def __init__(self, values: int, operations: int) -> None:
        super().__init__()
        self._values, self._operations = values, operations

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._operations -= 1
        if not (args and isinstance(args[0], torch.Tensor)):
            leaves = tree_leaves((args, kwargs))
            if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                # A shape, or the end or the number of steps of a range.
                self._values -= math.prod(max(1, abs(leaf)) for leaf in leaves if type(leaf) is int)
        if self._values < 0 or self._operations < 0:
            raise InputError("it would be far larger than its weights")
        return func(*args, **(kwargs or {}))


@contextmanager
def bounded_allocation(num_bytes: int, tensors: int) -> Iterator[None]:
    """Within, raise InputError before a model is built that is far larger than the weights that it is to hold.

    Args:
        num_bytes, tensors: of the weights.
    """
    with _Bounded(16 * num_bytes + 2**26, 30 * tensors + 10_000):
        yield
