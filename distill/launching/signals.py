"""Stops a run on a signal, at the time limit, or when the launcher or another process of the launch has ended.

While the student trains, a signal is only noted; the loop polls for it, at the same step on all processes, and saves a
checkpoint. At all other times (packing, preflight, export, ...) there is nothing to save, and the signal raises
`Interrupted` at once. A thread watches, so that the process also ends while its main thread is blocked.
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
from distill.launching.launcher import is_launched

if TYPE_CHECKING:  # torch is imported long after the first signal may come
    from torch.distributed import ProcessGroup

    from distill.launching.ranks import Ranks

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT, LAUNCHER_ENDED, RANK_ENDED = "time limit (train.max_minutes)", "the launcher ended", "another process ended"
REASONS = (None, *(number.name for number in SIGNALS), RANK_ENDED, LAUNCHER_ENDED, TIME_LIMIT)
"""Where processes have different reasons, the last one here is taken."""
SECOND_SIGINT = "a second SIGINT, at once"
LOOK = 0.5
"""Seconds between two checks of the launcher and the other processes."""
REPEATED = 1.0
"""Seconds within which two SIGINT count as one Ctrl-C: the terminal sends it, and the launcher passes it on."""
TO_LEAVE, TO_END_STEP = 5.0, 20.0
"""Seconds after which the process is ended from the watching thread: where nothing is to be saved, and in a step that
waits for a process that has ended. torchrun kills after 30."""
TO_NOTICE = 3.0
"""Seconds to wait for the end of a process to become visible after a connection to it broke."""


class Endable(Protocol):
    """A run, by its directory."""

    path: Path

    def end(self, error: BaseException) -> bool:
        """Write down that `error` ended it; whether this process did so."""


class StopRequest:
    """Whether and why to stop, the same on all processes: SIGTERM, SIGINT, SIGUSR1, SIGHUP, the time limit or the end
    of the launcher. To be made on the thread that trains; on the main thread it handles signals until it is closed.
    """

    def __init__(self, on_exit: Callable[[BaseException], int] | None = None) -> None:
        """
        Args:
            on_exit: writes down and prints why the run ended, and returns the exit code; called where the main thread
                is blocked. None: the process is never ended from here, and a second SIGINT raises `Interrupted`.
        """
        self.runs: list[Endable] = []
        """The one that was asked for, and within it those that have begun and not finished."""
        self.group: ProcessGroup | None = None
        self._ranks: Ranks | None = None
        self._on_exit = on_exit
        self._parent = os.getppid() if is_launched() else None
        self._reason: str | None = None
        self._agreed = False
        self._deadline: float | None = None
        self._loading = on_exit is not None
        self._raises = True
        self._training = False
        self._ending = False
        self._rank_gone = False
        self._cause: BaseException | None = None
        self._due: float | None = None
        self._interrupted_at: float | None = None
        self._arrivals, self._arriving = os.pipe()
        os.set_blocking(self._arriving, False)
        self._earlier: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                    self._earlier[number] = signal.signal(number, self._handle)
            self._earlier_wakeup = signal.set_wakeup_fd(self._arriving, warn_on_full_buffer=False)
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
        if self._earlier:
            signal.set_wakeup_fd(self._earlier_wakeup)
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._closed = True
        os.write(self._arriving, bytes(1))
        self._thread.join()
        os.close(self._arrivals)
        os.close(self._arriving)
        if self._ranks is not None:
            self._ranks.close()
        _current.reset(self._token)

    @staticmethod
    def current() -> StopRequest:
        """The one that this thread made.

        Raises:
            RuntimeError: there is none.
        """
        if (stop := _current.get()) is None:
            raise RuntimeError("A run needs a StopRequest, made before anything that takes long.")
        return stop

    def loaded(self) -> None:
        """All modules are imported: from now on a signal raises `Interrupted`. Before, it ends the process at once,
        because an exception would leave a module half imported.
        """
        self._loading = False

    def limit(self, max_minutes: float | None) -> None:
        """Ask for a stop so many minutes from now."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def join(self, group: ProcessGroup, ranks: Ranks) -> None:
        """From now on decide with the other processes. `group` is on the host, so that this never waits for the GPU."""
        self.group, self._ranks = group, ranks

    def finish(self) -> None:
        """From now on other processes may end, and signals are ignored: the rest of the run is as short as stopping it.
        Collective.
        """
        group, self.group = self.group, None
        if group is not None:
            import torch.distributed as dist

            dist.barrier(group)
        self._raises, self._ending, self._due = False, True, None

    def reason(self) -> str | None:
        """Why to stop now, or None; collective: every process must ask at the same steps."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = TIME_LIMIT
        if self.group is None:
            return self._reason
        import torch
        import torch.distributed as dist

        asked = torch.tensor([REASONS.index(self._reason)], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        reason = REASONS[int(asked)]
        self._agreed = reason is not None
        return reason

    def exit_cause(self, error: BaseException) -> BaseException:
        """What ended the run, given the `error` of this process. If another process died or failed first, this one only
        sees a broken connection, or the launcher's SIGTERM. From here on signals are ignored.
        """
        self._raises, self._ending = False, True
        self._due = None if self._due is None else time.monotonic() + TO_END_STEP
        if self._ranks is None or self.group is None or error is self._cause:
            return error
        if not self._agreed and not isinstance(error, InputError | RunFailed):
            until = time.monotonic() + (0 if isinstance(error, Interrupted) else TO_NOTICE)
            while (cause := self._ranks.exit_cause()) is None and time.monotonic() < until:
                time.sleep(LOOK / 5)
            error = cause or error
        self._cause = error
        self._ranks.leave(error)
        return error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)
        if self._loading:
            self._end(Interrupted(self._reason))
        if self._on_exit is None and not self._ending and self._is_second(number):
            self._agreed = True
            raise Interrupted(SECOND_SIGINT)
        if self._raises:
            self._raises = False
            raise Interrupted(self._reason)

    def _ask(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _interrupt(self, reason: str) -> None:
        """Set the reason, and interrupt the main thread as a signal would."""
        self._ask(reason)
        if self._earlier:
            os.kill(os.getpid(), signal.SIGUSR1)

    def _watch(self) -> None:
        """Run by the watching thread. Python runs signal handlers between two instructions of the main thread; the
        wake-up descriptor tells this thread at once.
        """
        while not self._closed:
            if select.select([self._arrivals], [], [], LOOK)[0]:
                # Every handled signal is reported here, also those of others (SIGCHLD of a loader's worker).
                for number in os.read(self._arrivals, 64):
                    if number in SIGNALS:
                        self._arrived(number)
            if self._parent is not None and self._reason is None and os.getppid() != self._parent:
                self._interrupt(LAUNCHER_ENDED)
            if self.group is not None and self._ranks is not None and not self._rank_gone and self._ranks.ended():
                self._rank_gone = True
                self._set_due(TO_END_STEP)
                self._interrupt(RANK_ENDED)
            if self._due is not None and time.monotonic() > self._due:
                self._end(Interrupted(self._reason))

    def _arrived(self, number: int) -> None:
        self._ask(signal.Signals(number).name)
        if self._on_exit is not None and self._is_second(number):
            self._agreed = True
            self._end(Interrupted(SECOND_SIGINT))
        if not self._training and not self._ending:
            self._set_due(TO_LEAVE)

    def _is_second(self, number: int) -> bool:
        """Whether this is another Ctrl-C."""
        if number != signal.SIGINT:
            return False
        now, first = time.monotonic(), self._interrupted_at
        self._interrupted_at = first or now
        return first is not None and now - first > REPEATED

    def _set_due(self, seconds: float) -> None:
        if self._on_exit is not None:
            due = time.monotonic() + seconds
            self._due = due if self._due is None else min(due, self._due)

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
    """Within, there is a `StopRequest`: that of the command, or one that leaves the process as it was."""
    with StopRequest() if _current.get() is None else nullcontext():
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal waits until `StopRequest.reason` is asked; one that nobody asked for raises at the end."""
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


def stoppable(batches: Iterable[T], questions: int) -> Iterator[T]:
    """The same batches; while the student trains, whether to stop is asked after each, on every process so many times.

    Raises:
        Interrupted: asked to stop, all processes alike.
    """
    left = questions
    for batch in batches:
        yield batch
        if left > 0:
            left -= 1
            _stop_if_asked()
    for _ in range(left):
        _stop_if_asked()


def _stop_if_asked() -> None:
    stop = _current.get()
    if stop is not None and stop._training and (reason := stop.reason()) is not None:
        raise Interrupted(reason)


def _leave_it_to_the_parent() -> None:
    """In a forked worker: a signal to the process group is for the parent, which ends its workers itself."""
    stop = _current.get()
    if stop is not None and stop._earlier:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_it_to_the_parent)


def outlive_one_sigterm(worker: int) -> None:
    """For a data loader's workers, which set a handler of their own: torchrun's SIGTERM goes to them too, and the
    parent still needs them for its last step. The next one ends them.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)
