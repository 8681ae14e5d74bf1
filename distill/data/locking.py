"""A lock for files that several processes may want to create: one does, the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import InputError
from distill.files.regular import regular


@contextmanager
def one_at_a_time(path: Path, remedy: str) -> Iterator[None]:
    """Hold a lock file beside `path`, whose folder is created if missing. The kernel releases it when its holder
    dies.

    Raises:
        InputError: the lock file cannot be created; ends with `remedy`.
    """
    lock_path = path.parent / f".{path.name}.lock"
    try:
        lock, made_folder = _acquire(lock_path)
    except OSError as error:
        raise InputError(f"{path}: no such file, and it cannot be created ({error.strerror}); {remedy}") from None
    try:
        yield
    finally:
        lock_path.unlink()
        os.close(lock)
        if made_folder and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _acquire(path: Path) -> tuple[int, bool]:
    """The lock's file descriptor, and whether its folder was created."""
    while True:
        made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = regular(str(path), os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The last holder may have removed the file while we waited; then others see another file than ours.
        try:
            current = path.lstat().st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(lock).st_ino:
            return lock, made_folder
        os.close(lock)
