"""How a run is spread over devices, processes and threads: everything that asks accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from distill.errors import InputError
from distill.recipe.schema import Recipe, Train

T = TypeVar("T")


def build_accelerator(train: Train, directory: Path) -> Accelerator:
    """The accelerator of one run, in the recipe's precision.

    Raises:
        InputError: the precision does not exist on this device, or a tracker is not installed.
    """
    # One launch may run several recipes (the teacher's, the student's) of different precision; the process group stays.
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(train.precision or "", train.precision)
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError("train.precision: fp16 needs a GPU; on a CPU use bf16 or fp32.")
    for tracker in train.trackers:
        _require_tracker(tracker)
    accelerator = Accelerator(
        mixed_precision=precision, log_with=list(train.trackers) or None, project_dir=str(directory)
    )
    # The loop divides by the accumulation itself; the environment must not make accelerate divide a second time.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe, with the precision that accelerate was launched with where it names none of its own.

    Raises:
        InputError: accelerate was launched with a precision that a recipe does not have.
    """
    if recipe.train.precision is not None:
        return recipe
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = {"no": "fp32"}.get(launched, launched)
    if precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"--mixed_precision {launched}: not supported; take no, bf16 or fp16, or set train.precision.")
    return recipe.replace(train=recipe.train.model_copy(update={"precision": precision}))


def _require_tracker(name: str) -> None:
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]
    if not available():
        raise InputError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out.")


def start_processes() -> PartialState:
    """Join the processes of this launch; to be called before anything else asks accelerate.

    accelerate itself looks at ACCELERATE_USE_CPU only when an Accelerator is built, too late for a group of CPU
    processes.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Packing data, or checking an export, on the main process may take longer than the usual ten minutes.
    return PartialState(cpu=cpu, timeout=timedelta(hours=2))


def set_threads() -> int:
    """Give this process its share of the machine's cores and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1, for a single process too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process; its result, or its InputError, reaches every process."""
    state = PartialState()
    outcome: list = [None, None]
    if state.is_main_process:
        try:
            outcome = [action(), None]
        except InputError as error:
            outcome = [None, str(error)]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise InputError(problem)
    return result


def marking_process(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; an InputError among them (an image that cannot be read) tells which process met it."""
    try:
        yield from batches
    except InputError as error:
        error.process = PartialState().process_index
        raise
