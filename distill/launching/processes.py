"""Set-up of accelerate: devices, processes, precision and threads of a run."""

from __future__ import annotations

import ctypes
import inspect
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
from torch.nn.parallel import DistributedDataParallel

from distill.cores import share_of_cores, share_of_free_cores
from distill.errors import InputError, RunFailed
from distill.launching.determinism import set_deterministic, use_full_float32
from distill.launching.exit_messages import describe
from distill.launching.launcher import GROUP, is_launched
from distill.launching.ranks import Ranks
from distill.launching.signals import StopRequest
from distill.recipe.schema import Recipe, Train

T = TypeVar("T")
_log = logging.getLogger("distill")

TIMEOUT = timedelta(hours=2)
"""Of collective operations: others wait while the main process packs data or checks an export."""
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Suffixes of ACCELERATE_USE_... variables that ask for sharded models."""
# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
_keeps_freed_memory = False
_groups = itertools.count()
"""Numbers the process groups of this process, one per run in Python."""


class _ParallelOptions(DistributedDataParallelKwargs):
    """Of DistributedDataParallel, without a broadcast of buffers in every forward pass: in training each process
    normalises by its own batch, and the main process's running statistics are evaluated and saved.
    """

    def to_kwargs(self) -> dict[str, Any]:
        # torch 2.13 has a new name for it.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return super().to_kwargs() | {name: False}


def build_accelerator(train: Train, directory: Path) -> Accelerator:
    """The accelerator of one run, in the recipe's precision.

    Raises:
        InputError: the device does not support the precision, or a tracker is not installed.
    """
    set_deterministic(train.deterministic)
    # Recipes of one launch (teacher's, student's) may differ in precision; the process group stays.
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(train.precision or "", train.precision)
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError("train.precision: fp16 needs a GPU; on a CPU use bf16 or fp32.")
    for tracker in train.trackers:
        _require_tracker(tracker)
    accelerator = Accelerator(
        mixed_precision=precision,
        dynamo_backend="no",  # see train.compile
        log_with=list(train.trackers) or None,
        project_dir=str(directory),
    )
    accelerator.ddp_handler = _ParallelOptions(gradient_as_bucket_view=True)  # which saves a copy
    # The loop divides by the accumulation steps itself; accelerate must not do so again.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe with its precision resolved: by default the launcher's, and fp32 in place of bf16 on a device that
    would have to emulate it.

    Raises:
        InputError: the launcher's precision is not supported.
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
    elif precision == "bf16" and _emulates_bf16(PartialState().device):
        precision = "fp32"
    return recipe.replace(train=recipe.train.model_copy(update={"precision": precision}))


@cache
def _emulates_bf16(device: torch.device) -> bool:
    """Whether this is a GPU without bf16, of before Ampere; logged once."""
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    _log.info("precision: fp32 instead of bf16, which this GPU only emulates; train.precision=fp16 is faster")
    return True


@cache
def _bf16_or_fp32() -> Literal["bf16", "fp32"]:
    """Whichever is faster on this CPU; logged once."""
    found = bf16_instructions()
    if found is None:
        _log.info("precision: fp32 instead of bf16, which is slower on this CPU, for lack of bf16 instructions")
        return "fp32"
    _log.info("precision: bf16, with this CPU's %s instructions", found)
    return "bf16"


def bf16_instructions() -> str | None:
    """This CPU's instructions for bf16 matrix products; None: it has none, and computes in fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if known.get(name)), None)
    if platform.machine() in ("aarch64", "arm64"):
        # On x86 this is also true for CPUs that only emulate bf16.
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
    """Join the process group of this launch; call it before any other use of accelerate.

    accelerate itself reads ACCELERATE_USE_CPU only when an Accelerator is built, too late for the process group.

    Raises:
        InputError: accelerate is configured for sharded models.
    """
    for name in SHARDED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise InputError(
                f"accelerate: {name} is configured, for models that do not fit one device. Here each process holds the "
                "whole student: launch with --multi_gpu, or with a file of recipes/accelerate as --config_file."
            )
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    options: dict[str, Any] = {}
    if not os.environ.keys() >= GROUP:  # the others are not of a launch of this process; accelerate would wait for it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    elif not dist.is_initialized():
        store, rank, size = _launch_store()
        options = {"store": dist.PrefixStore(f"distill/{next(_groups)}", store), "rank": rank, "world_size": size}
    state = PartialState(cpu=cpu, timeout=TIMEOUT, **options)
    if state.device.type == "cpu":
        keep_freed_memory()
    elif state.device.type == "cuda":
        use_full_float32()
    return state


@cache
def _launch_store() -> tuple[dist.Store, int, int]:
    """The key-value store of this launch, the rank and the number of processes. It outlives process groups, each of
    which has its own key prefix.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return store, rank, size


def join_processes(stop: StopRequest) -> None:
    """Let the processes of this launch stop together and watch one another. Collective."""
    if dist.is_initialized():
        # On the host, so that polling never synchronises with the GPU.
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        stop.join(group, Ranks(group))


def keep_freed_memory() -> None:
    """Configure glibc's malloc, if it is in use, to keep large freed blocks.

    By default their pages return to the system and are zeroed again for the next step's activations: 125,000 to
    135,000 page faults and 0.3 s of system time in a step of ViT-Tiny/4 at batch 128 in bf16, on 2 cores. Without them
    a step takes 0.88 to 0.95 of the time (ViT-Tiny and Nano, fp32 and bf16), at the same peak memory.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        global _keeps_freed_memory
        _keeps_freed_memory = True


def restore_malloc() -> None:
    """Undo `keep_freed_memory`, to glibc's thresholds after a block of 32 MiB has been freed."""
    global _keeps_freed_memory
    if _keeps_freed_memory:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)
        ctypes.CDLL(None).malloc_trim(0)
        _keeps_freed_memory = False


def set_threads(asked: int | None = None, earlier: int | None = None) -> int:
    """Set torch's threads, and return their number: that of the cores that are free. Collective.

    Args:
        asked: the number to set instead.
        earlier: that of the run that is resumed. Kept, so that it continues bit for bit, if there are so many cores.
    """
    threads = on_main(lambda: asked or _number_of_threads(earlier))
    torch.set_num_threads(threads)
    return threads


def _number_of_threads(earlier: int | None) -> int:
    most = share_of_cores()
    if earlier is not None and earlier <= most:
        return earlier
    if earlier is not None:
        _log.warning("the run began with %d threads; here are %d cores: it continues to rounding", earlier, most)
    # `accelerate launch` and torchrun set it to 1 where the user did not.
    given = "" if is_launched() else os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdecimal() and int(given):
        return int(given)
    free = share_of_free_cores()
    if free < most:
        _log.info("threads: %d; other processes use the other cores (train.threads sets the number)", free)
    return free


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process and return its result on every process. Collective.

    Raises:
        InputError, RunFailed: those of `action`, on every process.
        RunFailed: for any other exception of `action`, which the main process raises itself.
    """
    state = PartialState()
    outcome: list = [None, None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            expected = isinstance(error, InputError | RunFailed)
            outcome[1] = error if expected else RunFailed(f"process 0: {describe(error)}")
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, problem = outcome
    if failure is not None:
        raise failure
    if problem is not None:
        raise problem
    return result


def with_process_index(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches unchanged; set `process` on an InputError that reading them raises (a broken image)."""
    try:
        yield from batches
    except InputError as error:
        error.process = PartialState().process_index
        raise
