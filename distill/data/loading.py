"""Loaders with worker processes, which may stop delivering: `/dev/shm` is full, the storage hangs, a worker died."""

from __future__ import annotations

import atexit
import errno
import multiprocessing.process
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor
from torch.utils import data as torch_data
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from distill.errors import RunFailed
from distill.launching.signals import stop_while_waiting

POLL_INTERVAL = 1.0
"""Seconds between two checks while a batch is waited for."""
IDLE_LIMIT = 60.0
"""Seconds without a batch in which no worker computes or reads until the run fails."""
BUSY = 0.2
"""Seconds of processor time of all workers together that count as computing: idle ones only poll."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux has the shared memory by which workers hand over tensors."""
_iterators: weakref.WeakSet[_MultiProcessingDataLoaderIter] = weakref.WeakSet()
"""Those that may have workers."""


def worker_loader(
    dataset: Any,
    *,
    workers: int,
    batch_size: int | None = None,
    collate: Callable[[Any], Any] = torch_data.default_convert,
    **options: Any,
) -> torch_data.DataLoader:
    """A `DataLoader` with so many workers, for `items`; `options` are further arguments of it.

    Args:
        batch_size: of batches that `collate` makes of samples; None: `collate` gets the dataset's items one by one.
    """
    return torch_data.DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Shared(collate),
        worker_init_fn=_ignore_first_sigterm,
        **options,
    )


def _ignore_first_sigterm(worker: int) -> None:
    """torchrun sends SIGTERM to workers too, which the parent still needs for its last step; the second ends them."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


class _Shared:
    """`convert`, and in a worker its tensors are moved to shared memory. Else a thread of the worker would do so, whose
    errors reach nobody.
    """

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, item: Any) -> Any:
        item = self.convert(item)
        if torch_data.get_worker_info() is not None:
            for part in item if isinstance(item, tuple | list) else ():
                if isinstance(part, Tensor):
                    part.share_memory_()
        return item


def items(loader: torch_data.DataLoader) -> Iterator[Any]:
    """The items of a loader.

    Raises:
        RunFailed: the workers cannot deliver.
        Interrupted: a stop was requested while an item was waited for.
    """
    if loader.num_workers == 0:
        yield from loader
        return
    if isinstance(earlier := loader._iterator, _MultiProcessingDataLoaderIter):
        earlier._timeout = 0  # it is reset now, which is no item to poll for
    try:
        iterator = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:  # no room for a semaphore
            raise
        raise _no_shared_memory() from error
    assert isinstance(iterator, _MultiProcessingDataLoaderIter)
    _iterators.add(iterator)
    # By the loader's own argument, its reset would time out too. A `next` that timed out can be called again.
    iterator._timeout = POLL_INTERVAL
    if iterator._worker_pids_set:  # or torch raises that a worker died wherever the main thread is
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    while True:
        try:
            item = _next(iterator)
        except StopIteration:
            return
        yield item


def _next(iterator: _MultiProcessingDataLoaderIter) -> Any:
    try:
        return _polled(iterator)
    except StopIteration:
        raise
    except BaseException:
        _abandon(iterator)
        raise


def _polled(iterator: _MultiProcessingDataLoaderIter) -> Any:
    waited = idle = 0.0
    activity: tuple[float, int] | None = None
    while True:
        try:
            return next(iterator)
        except (RuntimeError, OSError, EOFError) as error:  # not to be opened, or not whole: what a dead worker sent
            if "DataLoader timed out" not in str(error):
                if (described := _described(error, iterator)) is None:
                    raise
                raise described from error
        waited += POLL_INTERVAL
        stop_while_waiting(waited)
        now = _activity(iterator)
        if activity is None or now[0] - activity[0] > BUSY or now[1] > activity[1]:
            activity, idle = now, 0.0
        idle += POLL_INTERVAL
        if idle > IDLE_LIMIT:
            raise RunFailed(
                f"data: no batch came for {waited:.0f} s, and none of {len(iterator._workers)} workers reads or "
                f"computes. {_shared_memory()}, by which they hand over images: if that is little, give it more "
                "(docker run --shm-size) or set data.workers=0. Else the storage of the data does not answer."
            )


def _activity(iterator: _MultiProcessingDataLoaderIter) -> tuple[float, int]:
    """Processor seconds, and bytes read, of the workers up to now."""
    seconds, read = 0.0, 0
    for worker in iterator._workers:
        with suppress(psutil.Error):  # it has just ended
            process = psutil.Process(worker.pid)
            seconds += sum(process.cpu_times()[:2])
            if hasattr(process, "io_counters"):  # not on macOS
                read += process.io_counters().read_chars
    return seconds, read


def _abandon(iterator: _MultiProcessingDataLoaderIter) -> None:
    """Kill the workers, and let nothing wait for their end: one that waits for storage dies only when that answers."""
    for worker in iterator._workers:
        worker.kill()
        multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


@atexit.register
def _kill_workers() -> None:
    """Python would end them by one SIGTERM, which they ignore, and wait for them."""
    for iterator in list(_iterators):
        _abandon(iterator)


def _described(error: Exception, iterator: _MultiProcessingDataLoaderIter) -> RunFailed | None:
    """The error for users, if a worker died or had no shared memory."""
    for worker in iterator._workers if isinstance(error, OSError | EOFError) else ():
        worker.join(timeout=0.2)
    codes = {worker.pid: worker.exitcode for worker in iterator._workers if worker.exitcode}
    if not codes:
        return _no_shared_memory() if "shared memory" in str(error) else None
    pid, code = next(iter(codes.items()))
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RunFailed(
        f"data: a worker (pid {pid}) died: {reason}. {_shared_memory()}, by which workers hand over images, and "
        f"{psutil.virtual_memory().available:,} bytes of memory are available: give them more, or set data.workers=0."
    )


def _no_shared_memory() -> RunFailed:
    return RunFailed(
        f"data: the workers cannot hand over their images: {_shared_memory()}. Give it more (docker run "
        "--shm-size), or set data.workers=0."
    )


def _shared_memory() -> str:
    if not SHARED_MEMORY.is_dir():
        return "the shared memory of this system"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{SHARED_MEMORY} has {usage.free:,} of {usage.total:,} bytes free"
