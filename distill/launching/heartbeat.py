"""A thread by which each process of a launch shows the others that it lives, through the launch's key-value store."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import torch.distributed as dist

BEAT_INTERVAL = 3.0
"""Seconds between two beats: one small write and one read of all processes' values."""
CLOSE_TIMEOUT = 1.0
"""Seconds to wait for the thread's end."""


class Heartbeat:
    """Writes this process's beats and its exit message, and reads those of all.

    Only its thread uses the store, which blocks while the store's machine does not answer; nothing else waits for it
    without a limit. It beats whatever the main thread does, also in packing or compilation.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """`store`: a connection of its own. Call `start` when all processes have constructed theirs."""
        self._store, self._key = store, _key(rank)
        self._keys = [_key(other) for other in range(size)]
        self.values: list[list[Any]] = [[None, None]] * size
        """By rank: beat (another at each time) and exit message, as last read."""
        self.ended = False
        """Whether the store has closed its connection, so that nothing is read any more."""
        self._message: Any = None
        self._asked = self._done = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._write()  # so that reading never waits for a key, and finds no message of an earlier run

    def start(self) -> None:
        self._thread.start()

    def refresh(self, timeout: float) -> None:
        """Return when all values have been read after this call, or after `timeout` seconds."""
        with self._changed:
            self._asked += 1
            asked = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.ended or self._done >= asked, timeout)

    def write_message(self, message: Any, timeout: float) -> None:
        """Store the exit message of this process, plain data, for the others; waits for `timeout` seconds at most."""
        self._message = message
        self.refresh(timeout)

    def close(self) -> None:
        """End the thread; does not wait for one whose store does not answer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=CLOSE_TIMEOUT)

    def _run(self) -> None:
        asked = 0
        while not self._closed:
            try:
                self._write()
                values = [json.loads(value) for value in self._store.multi_get(self._keys)]
            except RuntimeError:  # the store ended, with its process
                break
            with self._changed:
                self.values, self._done = values, asked
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._asked > self._done, BEAT_INTERVAL)
                asked = self._asked
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _write(self) -> None:
        self._store.set(self._key, json.dumps([time.monotonic_ns(), self._message]))


def _key(rank: int) -> str:
    return f"distill/heartbeat/{rank}"
