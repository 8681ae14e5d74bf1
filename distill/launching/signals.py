"""Stopping in time: a signal, the time limit, the launcher's end or a peer's ends the run, with a checkpoint where
there is something to save.

While the student trains, a signal is noted and the loop asks for it, at the same step on all processes. At all other
times (packing, preflight, export, ...) there is nothing to save, and the signal raises `Interrupted` at once.
A thread sees to it that this happens even while the main thread waits for somebody who is gone.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from distill.errors import InputError, RunFailed
from distill.launching.launcher import Process

if TYPE_CHECKING:  # torch is imported long after the first signal may come
    from torch.distributed import ProcessGroup

    from distill.launching.peers import Peers
    from distill.run import Run

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT, LAUNCHER_ENDED, PEER_ENDED = "time limit (train.max_minutes)", "the launcher ended", "another process ended"
REASONS = (None, *(number.name for number in SIGNALS), PEER_ENDED, LAUNCHER_ENDED, TIME_LIMIT)
"""Of several, the last one counts."""
LOOK = 0.5
"""Seconds between two looks at launcher and peers."""
REPEATED = 1.0
"""Seconds within which a launcher passes on the SIGINT that a terminal has sent already: one Ctrl-C, not two."""
TO_LEAVE, TO_END_STEP = 5.0, 20.0
"""Seconds that a main thread has to leave where nothing is to be saved, and from a step whose peer is gone. torchrun
kills after 30."""
TO_NOTICE = 3.0
"""Seconds in which a peer's end shows, after it has broken a connection."""


class Interrupted(BaseException):
    """The run stopped early and can be resumed; the text says why. No `except Exception` on its way may keep it."""


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGHUP, the time limit or the end of the launcher; all processes get the same
    answer. One a process, on its main thread.
    """

    def __init__(self, launcher: Process | None, leave: Callable[[BaseException], int]) -> None:
        """`leave` says the last words and returns the exit code, where the main thread cannot."""
        self.peers: Peers | None = None
        self.runs: list[Run] = []
        """The one that was asked for, and within it those that have begun and not finished."""
        self._launcher, self._leave = launcher, leave
        self._reason: str | None = None
        self._agreed = False
        self._deadline: float | None = None
        self.group: ProcessGroup | None = None
        self._loading = self._raises = True
        self._training = False
        self._ending = False
        self._peer_gone = False
        self._verdict: BaseException | None = None
        self._told = True
        self._due: float | None = None
        self._interrupted_at: float | None = None
        self._arrivals, arriving = os.pipe()
        os.set_blocking(arriving, False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(arriving, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_it_to_the_parent)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()
        global _current
        _current = self

    @staticmethod
    def current() -> StopRequest:
        """That of this process."""
        assert _current is not None, "made by the command, before anything that takes long"
        return _current

    def loaded(self) -> None:
        """All modules are imported: from now on the process is left through its blocks' ends. An exception out of
        nowhere would leave a module half imported, which others may take for whole.
        """
        self._loading = False

    def limit(self, max_minutes: float | None) -> None:
        """Ask for a stop after so many minutes from now."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def join(self, group: ProcessGroup, peers: Peers) -> None:
        """From now on ask together. `group` is of the host, so that asking never waits for the GPU."""
        self.group, self.peers = group, peers

    def part(self) -> None:
        """From now on peers may end, and signals change nothing: what is left takes no longer than stopping would."""
        self._raises, self._ending, self._due = False, True, None
        self.peers = self.group = None

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

    def verdict(self, error: BaseException) -> BaseException:
        """What really ended the run, where `error` is what this process met: of a peer that died, or was the first to
        leave, the others see a broken connection, or the launcher's SIGTERM. From here on signals change nothing.
        """
        self._raises, self._ending = False, True
        self._due = None if self._due is None else time.monotonic() + TO_END_STEP
        if self.peers is None or error is self._verdict:
            return error
        if not self._agreed and not isinstance(error, InputError | RunFailed):
            until = time.monotonic() + (0 if isinstance(error, Interrupted) else TO_NOTICE)
            while (end := self.peers.end()) is None and time.monotonic() < until:
                time.sleep(LOOK / 5)
            error = end or self.peers.broken(error) or error
        self._verdict = error
        self._told = self.peers.leave(error)
        return error

    @property
    def writes(self) -> bool:
        """Whether this is the process that says and writes how the run ended: the main one, or, where that is dead, the
        first of those that live beside it.
        """
        if self.peers is None:
            return os.environ.get("RANK", "0") == "0"
        return self.peers.rank == 0 or (0 in self.peers.dead() and self.peers.first_here())

    @property
    def speaks(self) -> bool:
        """Whether this process says on the console how it ended: where no other does."""
        return self.writes or not self._told

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)
        if self._loading:
            self._end(Interrupted(self._reason))
        if self._raises:
            self._raises = False
            raise Interrupted(self._reason)

    def _ask(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _watch(self) -> NoReturn:
        """Handlers wait for the main thread's next line of Python; this thread learns of a signal when it comes."""
        while True:
            if select.select([self._arrivals], [], [], LOOK)[0]:
                # Of others that somebody handles (a loader whose worker ends: SIGCHLD) word comes here too.
                for number in os.read(self._arrivals, 64):
                    if number in SIGNALS:
                        self._arrived(number)
            if self._launcher is not None and self._reason is None and not self._launcher.lives:
                self._ask(LAUNCHER_ENDED)
                os.kill(os.getpid(), signal.SIGUSR1)
            if self.peers is not None and not self._peer_gone and self.peers.anyone_gone():
                self._peer_gone = True
                self._ask(PEER_ENDED)
                self._set_due(TO_END_STEP)
                os.kill(os.getpid(), signal.SIGUSR1)
            if self._due is not None and time.monotonic() > self._due:
                self._end(Interrupted(self._reason))

    def _arrived(self, number: int) -> None:
        now = time.monotonic()
        self._ask(signal.Signals(number).name)
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > REPEATED:
                self._agreed = True
                self._end(Interrupted("a second SIGINT, at once"))
            self._interrupted_at = self._interrupted_at or now
        if not self._training and not self._ending:
            self._set_due(TO_LEAVE)

    def _set_due(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        self._due = due if self._due is None else min(due, self._due)

    def _end(self, error: BaseException) -> NoReturn:
        """End the process, whatever its main thread waits for."""
        code = 1
        try:
            code = self._leave(self.verdict(error))
        finally:
            os._exit(code)


_current: StopRequest | None = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal waits until `StopRequest.reason` is asked; one that nobody asked for raises at the end."""
    stop = _current
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


def verdict(error: BaseException) -> tuple[BaseException, bool]:
    """See `StopRequest.verdict`; and whether this process writes it down."""
    if _current is None:
        return error, True
    return _current.verdict(error), _current.writes


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
    if _current is not None and _current._training and (reason := _current.reason()) is not None:
        raise Interrupted(reason)


def _leave_it_to_the_parent() -> None:
    """In a forked worker: signals may reach the whole group, and the parent decides when its workers end."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def outlive_one_sigterm(worker: int) -> None:
    """For a data loader's workers, which set a handler of their own: torchrun's SIGTERM goes to them too, and the
    parent still needs them for its last step. The next one ends them.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)
