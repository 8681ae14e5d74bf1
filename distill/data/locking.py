"""Several processes of a run find the same file missing: one makes it, the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import InputError


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock file beside `path`, whose folder is made where missing. The system releases it when its holder
    dies.
    """
    lock_path = path.parent / f".{path.name}.lock"
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(lock_path)
    except OSError as error:
        raise InputError(
            f"{path}: no such file, and it cannot be made there ({error.strerror}); put it there or set data.root to a "
            "writable folder"
        ) from None
    try:
        yield
    finally:
        lock_path.unlink()
        os.close(lock)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _acquire(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Its last holder removed the file that we waited for: what we hold is no longer what others see.
        if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
        os.close(lock)
