"""How a run is spread over devices, processes and threads: everything that asks accelerate."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, parse_flag_from_env

from distill.cores import share_of_cores
from distill.errors import InputError, RunFailed
from distill.launching.determinism import set_deterministic
from distill.launching.ending import describe
from distill.launching.ranks import Ranks
from distill.launching.signals import StopRequest
from distill.recipe.schema import Recipe, Train

T = TypeVar("T")
_log = logging.getLogger("distill")

TIMEOUT = timedelta(hours=2)
"""Of collective operations: packing data, or checking an export, on the main process may take longer than the usual ten
minutes.
"""
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""ACCELERATE_USE_..."""
# Of mallopt(3), in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
_keeps = False
_groups = itertools.count()
"""Of the processes of this launch, one a run in Python."""


def build_accelerator(train: Train, directory: Path) -> Accelerator:
    """The accelerator of one run, in the recipe's precision.

    Raises:
        InputError: the precision does not exist on this device, or a tracker is not installed.
    """
    set_deterministic(train.deterministic)
    # One launch may run several recipes (the teacher's, the student's) of different precision; the process group stays.
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(train.precision or "", train.precision)
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError("train.precision: fp16 needs a GPU; on a CPU use bf16 or fp32.")
    for tracker in train.trackers:
        _require_tracker(tracker)
    # Buffers need no broadcast in every forward pass: in training each process normalises by its own batch, and the
    # main one's running statistics are the ones that are evaluated and saved. Gradients that live in the buckets are
    # not copied there.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=precision,
        dynamo_backend="no",  # train.compile says what is compiled
        log_with=list(train.trackers) or None,
        project_dir=str(directory),
        kwargs_handlers=[parallel],
    )
    # The loop divides by the accumulation itself; the environment must not make accelerate divide a second time.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe, with the precision that accelerate was launched with where it names none of its own, and fp32 in
    place of bf16 on a CPU that would have to emulate it.

    Raises:
        InputError: accelerate was launched with a precision that a recipe does not have.
    """
    precision = recipe.train.precision
    if precision is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "fp32", "bf16", "fp16"):
            raise InputError(
                f"--mixed_precision {launched}: not supported; take no, bf16 or fp16, or set train.precision."
            )
        precision = "fp32" if launched == "no" else launched  # type: ignore[assignment]
    if precision == "bf16" and PartialState().device.type == "cpu":
        precision = _bf16_or_fp32()
    return recipe.replace(train=recipe.train.model_copy(update={"precision": precision}))


@cache
def _bf16_or_fp32() -> Literal["bf16", "fp32"]:
    """Which of them this CPU is faster in; said once."""
    found = bf16_instructions()
    if found is None:
        _log.info("precision: fp32 instead of bf16, for which this CPU has no instructions and would be slower")
        return "fp32"
    _log.info("precision: bf16, for which this CPU has %s", found)
    return "bf16"


def bf16_instructions() -> str | None:
    """What this CPU multiplies matrices of bf16 with; None: with fp32 instructions, after converting."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if known.get(name)), None)
    if platform.machine() in ("aarch64", "arm64"):
        # On x86 the same question is answered with yes where the conversion is fast enough to be correct.
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


def _require_tracker(name: str) -> None:
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]
    if not available():
        raise InputError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out.")


def start_processes() -> PartialState:
    """Join the processes of this launch; to be called before anything else asks accelerate.

    accelerate itself looks at ACCELERATE_USE_CPU only when an Accelerator is built, too late for a group of CPU
    processes.

    Raises:
        InputError: the launch, or accelerate's configuration, asks for a model in shards.
    """
    for name in SHARDED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise InputError(
                f"accelerate was told to use {name}, for models that do not fit one device. Each process here holds "
                "the whole student: launch with --multi_gpu, or with a file of recipes/accelerate as --config_file."
            )
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    options: dict[str, Any] = {}
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and not dist.is_initialized():
        store, rank, size = _launch_store()
        options = {"store": dist.PrefixStore(f"distill/{next(_groups)}", store), "rank": rank, "world_size": size}
    state = PartialState(cpu=cpu, timeout=TIMEOUT, **options)
    if state.device.type == "cpu":
        keep_freed_memory()
    return state


@cache
def _launch_store() -> tuple[dist.Store, int, int]:
    """The store of this launch, rank and number of processes. It outlives a process group: the next one has keys of its
    own in it, and meets neither the addresses of the last one nor a store that ended with process 0's run.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return store, rank, size


def join_processes(stop: StopRequest) -> None:
    """Have the processes of this launch stop together, and notice one another's end. Collective."""
    if dist.is_initialized():
        # On the host, so that asking never waits for the GPU.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        stop.join(group, Ranks(group))


def keep_freed_memory() -> None:
    """Have malloc keep large blocks that are freed, where it is glibc's.

    By default their pages go back to the system and are zeroed again for the next step's activations: 125,000 to
    135,000 page faults and 0.3 s of system time in a step of ViT-Tiny/4 at batch 128 in bf16, on 2 cores. Without them
    a step takes 0.88 to 0.95 of the time (ViT-Tiny and Nano, fp32 and bf16); the peak of resident memory stays.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        global _keeps
        _keeps = True


def free_memory_as_before() -> None:
    """Undo `keep_freed_memory`: as glibc has it in a process that has ever freed a block of 32 MiB."""
    global _keeps
    if _keeps:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)
        ctypes.CDLL(None).malloc_trim(0)
        _keeps = False


def set_threads() -> int:
    """Give this process its share of the machine's cores and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1, for a single process too.
    """
    threads = share_of_cores()
    torch.set_num_threads(threads)
    return threads


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process; its result, or its failure, reaches every process. Collective.

    Raises:
        InputError, RunFailed: those of `action`, on every process.
        RunFailed: any other exception of `action`, by its type and text; the main process raises the exception itself.
    """
    state = PartialState()
    outcome: list = [None, None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            foreseen = isinstance(error, InputError | RunFailed)
            outcome[1] = error if foreseen else RunFailed(f"process 0: {describe(error)}")
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, problem = outcome
    if failure is not None:
        raise failure
    if problem is not None:
        raise problem
    return result


def marking_process(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; an InputError among them (an image that cannot be read) tells which process met it."""
    try:
        yield from batches
    except InputError as error:
        error.process = PartialState().process_index
        raise
