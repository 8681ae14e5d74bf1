"""Running out of memory in training: what would have fitted."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel

from distill.data import Batch
from distill.errors import InputError, RunFailed
from distill.launching.processes import return_freed_memory
from distill.memory import forget, is_out_of_memory
from distill.teaching.source import Frozen
from distill.trainer import Trainer
from distill.training.nonfinite import NonFiniteSteps

_log = logging.getLogger("distill")


@contextmanager
def advising(trainer: Trainer) -> Iterator[None]:
    """Within, the lack of memory ends in advice, found by trying; afterwards the trainer is of no further use.

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
        raise RunFailed(_advice(trainer)) from None


def _advice(trainer: Trainer) -> str:
    """The largest micro-batch that this process can train on, as settings that leave the global batch as it is."""
    train, plan = trainer.recipe.train, trainer.plan
    paired = trainer.dataset.augmenter.paired
    share = plan.batch_size // plan.num_processes
    _work_alone(trainer)
    larger = [
        accumulation
        for accumulation in range(plan.accumulation, share + 1)
        if share % accumulation == 0 and not (paired and share // accumulation % 2)
    ]
    stays = f"train.batch_size stays {plan.batch_size}."
    if comparing := dict.fromkeys(method.method for method in trainer.recipe.distill if method.needs.compares_samples):
        stays += f" {', '.join(comparing)}: comparing fewer samples at a time, the loss changes."
    happened = f"step {trainer.progress.step + 1}: out of memory with {plan.micro_batch} images at a time"
    if (found := _first_that_fits(trainer, share, larger[1:])) is not None:
        return f"{happened}. {share // found} at a time fit.\nSet train.gradient_accumulation={found}; {stays}"
    smallest = f"{happened}, and {share // larger[-1]} at a time would not fit either"
    if not train.gradient_checkpointing and _checkpoints_gradients(trainer):
        if (found := _first_that_fits(trainer, share, larger)) is not None:
            return (
                f"{smallest}; with gradient checkpointing {share // found} at a time fit.\n"
                f"Set train.gradient_checkpointing=true and train.gradient_accumulation={found}; {stays}"
            )
        smallest += ", nor with train.gradient_checkpointing=true"
    return f"{smallest}.\nTake a smaller student, teacher or data.resolution, or a device with more memory."


def _work_alone(trainer: Trainer) -> None:
    """Free what only other processes or compiled networks need; from here on steps are of this process alone."""
    if isinstance(trainer.model, DistributedDataParallel):
        trainer.model._remove_autograd_hooks()  # a backward pass would wait for the others
    trainer.optimizer.zero_grad()
    trainer.accelerator._models.clear()
    trainer.model = trainer.task
    for method in trainer.task.methods.values():
        method.collective = False  # type: ignore[assignment]
    trainer.nonfinite = NonFiniteSteps(trainer.accelerator, trainer.task, trainer.task, trainer.optimizer)
    if isinstance(trainer.source, Frozen):
        trainer.source.cache = None  # a teacher whose logits are stored may have to be asked all the same
    torch.compiler.reset()


def _checkpoints_gradients(trainer: Trainer) -> bool:
    """Have the student recompute its activations, if it can."""
    try:
        trainer.student.checkpoint_gradients()
    except InputError:
        return False
    return True


def _first_that_fits(trainer: Trainer, share: int, accumulations: list[int]) -> int | None:
    """The smallest of these (ascending) at which a step fits; None: none does."""
    low, high = 0, len(accumulations)
    while low < high:
        middle = (low + high) // 2
        if _fits(trainer, share // accumulations[middle]):
            high = middle
        else:
            low = middle + 1
    return accumulations[low] if low < len(accumulations) else None


def _fits(trainer: Trainer, size: int) -> bool:
    """Whether a step on micro-batches of this size does. It takes two: the second finds the gradients of the first."""
    info, device, side = trainer.dataset.info, trainer.accelerator.device, trainer.recipe.data.resolution
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()
    try:
        batch = Batch(
            torch.rand(size, info.channels, side, side, device=device),
            torch.full((size, info.num_classes), 1 / info.num_classes, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
        )
        # As it is, uncompiled: compiling takes minutes, and its code less memory.
        with torch.compiler.set_stance("force_eager"):
            trainer.train_step([batch, batch])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:  # whatever libraries say that find no memory
        forget(error)
        trainer.optimizer.zero_grad()
        return False
    return True
