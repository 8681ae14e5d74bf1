"""Stopping in time: a signal or the time limit ends the run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist


class Interrupted(Exception):
    """The run stopped early and can be resumed; the text says why."""


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 or the time limit; the loop asks after each step, and all processes get the same
    answer.

    A second SIGINT is not caught.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        # Processes agree on the host, over gloo, so that asking never waits for the GPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self) -> str | None:
        """Why to stop now, or None; collective: every process must ask at the same steps."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = "time limit (train.max_minutes)"
        if self._group is None:
            return self._reason
        asked = torch.tensor([self._reason is not None], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)  # type: ignore[arg-type]
        if not asked.item():
            return None
        return self._reason or "another process was asked to stop"
