"""Stops a run on a signal, at the time limit, or when the launcher or another process has ended or vanished.

While the student trains, a signal only sets a flag; the loop polls it, at the same step on all processes, and saves a
checkpoint. At all other times (packing, preflight, export, ...) there is nothing to save, and the signal raises
`Interrupted` at once. A watching thread ends the process if its main thread is blocked.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from distill.errors import InputError, Interrupted, RunFailed
from distill.launching.launcher import is_launched, launch_command

if TYPE_CHECKING:  # torch is imported late: signals may arrive before
    from torch.distributed import ProcessGroup

    from distill.launching.ranks import Ranks

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT, LAUNCHER_ENDED, RANK_ENDED = "time limit (train.max_minutes)", "the launcher ended", "another process ended"
REASONS = (None, *(number.name for number in SIGNALS), RANK_ENDED, LAUNCHER_ENDED, TIME_LIMIT)
"""In rising priority, for processes with different reasons."""
SECOND_SIGINT = "a second SIGINT, at once"
POLL_INTERVAL = 0.5
"""Seconds between two checks of the launcher and the other processes."""
DUPLICATE_WINDOW = 1.0
"""Seconds within which two SIGINT count as one Ctrl-C: the terminal sends one, and the launcher forwards it."""
IDLE_GRACE, STEP_GRACE = 5.0, 20.0
"""Seconds until the watching thread ends the process: with nothing to save, and in a step that waits for a process that
has ended. torchrun kills after 30."""
WAIT_GRACE = 10.0
"""Seconds to wait for a batch before a process stops without the others; torchrun kills after 30."""
DETECTION_TIMEOUT = 3.0
"""Seconds to wait until the end of a process is visible, after a connection to it broke."""


class Endable(Protocol):
    """A run directory."""

    path: Path

    def end(self, error: BaseException) -> bool:
        """Record that `error` ended the run; returns whether this process did so."""


class StopRequest:
    """Whether and why to stop, the same on all processes: SIGTERM, SIGINT, SIGUSR1, SIGHUP, the time limit or the end
    of the launcher. Create it on the training thread; on the main thread it handles signals until it is closed.
    """

    def __init__(self, on_exit: Callable[[BaseException], int] | None = None) -> None:
        """
        Args:
            on_exit: records and prints why the run ended, and returns the exit code; called on the watching thread if
                the main thread is blocked. None: never end the process; a second SIGINT raises `Interrupted`.
        """
        self.runs: list[Endable] = []
        """The requested run, and the runs within it that have begun and not finished."""
        self.group: ProcessGroup | None = None
        self._ranks: Ranks | None = None
        self._on_exit = on_exit
        self.launcher = os.getppid() if is_launched() else None
        """The process that started this one, if it is a launcher."""
        launch_command()  # of which the exit message may come after its end
        self._reason: str | None = None
        self._agreed = False
        self._time_limit: float | None = None
        self._loading = on_exit is not None
        self._raises = True
        self._training = False
        self._ending = False
        self._rank_ended = False
        self._cause: BaseException | None = None
        self._exit_deadline: float | None = None
        self._first_sigint: float | None = None
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)
        self._previous_handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                    self._previous_handlers[number] = signal.signal(number, self._handle)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        self._closed = False
        self._token = _current.set(self)
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the signal handlers that were there before, and end the watching thread."""
        if self._previous_handlers:
            signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._closed = True
        os.write(self._wakeup_write, bytes(1))
        self._thread.join()
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)
        if self._ranks is not None:
            self._ranks.close()
        _current.reset(self._token)

    @staticmethod
    def current() -> StopRequest:
        """The one that this thread created.

        Raises:
            RuntimeError: there is none.
        """
        if (stop := _current.get()) is None:
            raise RuntimeError("A run needs a StopRequest, made before anything that takes long.")
        return stop

    def loaded(self) -> None:
        """All modules are imported: from now on a signal raises `Interrupted`. Before, it ends the process, because an
        exception would leave a module partly imported.
        """
        self._loading = False

    def limit(self, max_minutes: float | None) -> None:
        """Stop after `max_minutes` from now; None: no limit."""
        self._time_limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def join(self, group: ProcessGroup, ranks: Ranks) -> None:
        """From now on agree with the other processes. `group` is a CPU group: no synchronisation with the GPU."""
        self.group, self._ranks = group, ranks

    def finish(self) -> None:
        """From now on ignore signals and the end of other processes: the rest of the run takes no longer than stopping.
        Collective.
        """
        group, self.group = self.group, None
        if group is not None:
            import torch.distributed as dist

            dist.barrier(group)
        if self._ranks is not None:
            self._ranks.stop_beating()
        self._raises, self._ending, self._exit_deadline = False, True, None

    def reason(self) -> str | None:
        """Why to stop now, or None. Collective: every process must call it at the same steps."""
        if self._reason is None and self._time_limit is not None and time.monotonic() > self._time_limit:
            self._reason = TIME_LIMIT
        if self.group is None:
            return self._reason
        import torch
        import torch.distributed as dist

        index = torch.tensor([REASONS.index(self._reason)], dtype=torch.int32)
        dist.all_reduce(index, dist.ReduceOp.MAX, group=self.group)
        reason = REASONS[int(index)]
        self._agreed = reason is not None
        return reason

    @property
    def isolated(self) -> bool:
        """Whether this machine has lost that of process 0, and has to say so itself."""
        return self._ranks is not None and self._ranks.isolated

    def exit_cause(self, error: BaseException) -> BaseException:
        """What ended the run, given the `error` of this process. If another process failed first, this one only sees a
        broken connection, or the launcher's SIGTERM. Signals are ignored from now on.
        """
        self._raises, self._ending = False, True
        self._exit_deadline = None if self._exit_deadline is None else time.monotonic() + STEP_GRACE
        if self._ranks is None or self.group is None or error is self._cause:
            return error
        if not self._agreed and not isinstance(error, InputError | RunFailed):
            until = time.monotonic() + (0 if isinstance(error, Interrupted) else DETECTION_TIMEOUT)
            while (cause := self._ranks.exit_cause()) is None and time.monotonic() < until:
                time.sleep(POLL_INTERVAL / 5)
            error = cause or error
        self._cause = error
        self._ranks.write_exit_message(error)
        return error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._set_reason(signal.Signals(number).name)
        if self._loading:
            self._end(Interrupted(self._reason))
        if self._on_exit is None and not self._ending and self._is_second(number):
            self._agreed = True
            raise Interrupted(SECOND_SIGINT)
        if self._raises:
            self._raises = False
            raise Interrupted(self._reason)

    def _set_reason(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _interrupt(self, reason: str) -> None:
        """Set the reason, and interrupt the main thread like a signal."""
        self._set_reason(reason)
        if self._previous_handlers:
            os.kill(os.getpid(), signal.SIGUSR1)

    def _watch(self) -> None:
        """The watching thread. Python calls signal handlers between two instructions of the main thread, which may be
        blocked; the wake-up file descriptor notifies this thread at once.
        """
        while not self._closed:
            if select.select([self._wakeup_read], [], [], POLL_INTERVAL)[0]:
                # All handled signals are reported here, also those of other handlers (SIGCHLD of a loader's worker).
                for number in os.read(self._wakeup_read, 64):
                    if number in SIGNALS:
                        self._on_arrival(number)
            if self.launcher is not None and self._reason is None and os.getppid() != self.launcher:
                self._interrupt(LAUNCHER_ENDED)
            if self.group is not None and self._ranks is not None and not self._rank_ended:
                silent = self._ranks.silent()
                if silent or self._ranks.ended():
                    self._rank_ended = True
                    self._set_exit_deadline(STEP_GRACE)
                    self._interrupt(RANK_ENDED)
                    if silent:
                        self._ranks.disconnect()
            if self._exit_deadline is not None and time.monotonic() > self._exit_deadline:
                self._end(Interrupted(self._reason))

    def _on_arrival(self, number: int) -> None:
        self._set_reason(signal.Signals(number).name)
        if self._on_exit is not None and self._is_second(number):
            self._agreed = True
            self._end(Interrupted(SECOND_SIGINT))
        if not self._training and not self._ending:
            self._set_exit_deadline(IDLE_GRACE)

    def _is_second(self, number: int) -> bool:
        """Whether this is a second Ctrl-C."""
        if number != signal.SIGINT:
            return False
        now, first = time.monotonic(), self._first_sigint
        self._first_sigint = first or now
        return first is not None and now - first > DUPLICATE_WINDOW

    def _set_exit_deadline(self, seconds: float) -> None:
        if self._on_exit is not None:
            due = time.monotonic() + seconds
            self._exit_deadline = due if self._exit_deadline is None else min(due, self._exit_deadline)

    def _end(self, error: BaseException) -> NoReturn:
        """End the process, whatever its main thread is doing."""
        code = 1
        try:
            if self._on_exit is not None:
                code = self._on_exit(self.exit_cause(error))
        finally:
            os._exit(code)


_current: ContextVar[StopRequest | None] = ContextVar("stop request", default=None)


@contextmanager
def stopping() -> Iterator[None]:
    """Provide a `StopRequest` within: that of the command, or a temporary one."""
    with StopRequest() if _current.get() is None else nullcontext():
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals within to the next call of `StopRequest.reason`, or to the end."""
    stop = _current.get()
    if stop is None:
        yield
        return
    raises, stop._raises, stop._training = stop._raises, False, True
    try:
        yield
    finally:
        stop._training = False
    stop._raises = raises
    if raises and stop._reason is not None:
        stop._raises = False
        raise Interrupted(stop._reason)


def exit_cause(error: BaseException) -> BaseException:
    """See `StopRequest.exit_cause`."""
    stop = _current.get()
    return error if stop is None else stop.exit_cause(error)


def stoppable(batches: Iterable[T], polls: int) -> Iterator[T]:
    """Yield the batches unchanged; while the student trains, poll after each whether to stop, `polls` times in all on
    every process.

    Raises:
        Interrupted: a stop was requested; on all processes.
    """
    left = polls
    for batch in batches:
        yield batch
        if left > 0:
            left -= 1
            _stop_if_requested()
    for _ in range(left):
        _stop_if_requested()


def _stop_if_requested() -> None:
    stop = _current.get()
    if stop is not None and stop._training and (reason := stop.reason()) is not None:
        raise Interrupted(reason)


def stop_while_waiting(seconds: float) -> None:
    """Raise Interrupted if a stop was requested while the student trains, and this process waits for data since so many
    seconds. One of several waits for `WAIT_GRACE` until it stops alone; then the others lose their connection to it.
    """
    stop = _current.get()
    if stop is None or not stop._training:
        return
    if stop.group is None:
        _stop_if_requested()
    elif stop._reason is not None and seconds > WAIT_GRACE:
        error = Interrupted(stop._reason)
        error.alone = True
        raise error


def _ignore_signals() -> None:
    """In a forked worker: signals to the process group are handled by the parent, which ends its workers itself."""
    stop = _current.get()
    if stop is not None and stop._previous_handlers:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_ignore_signals)
