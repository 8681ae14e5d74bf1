"""Atomic, flushed writing of files, and removal of folders."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from distill import faults
from distill.errors import RunFailed

_log = logging.getLogger("distill")


class NewFile:
    """Context manager for a file that does not exist yet, flushed to disk at its end. Not atomic by itself.

    Errors are raised at the end of the block, because `torch.save` would replace them.

    Raises:
        OSError: at the end of the block; it names the path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self._name = name or path.name
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None
        self._file = path.open("xb", buffering=0)
        faults.point(f"{self._name} opened")

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, unbuffered."""
        rest = memoryview(data)
        self._sha256.update(rest)
        try:
            while self._error is None and len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        faults.point(f"{self._name} begun")
        return len(data)

    def flush(self) -> None:
        """Required by `torch.save`; nothing is buffered."""

    def sha256(self) -> str:
        """Of all data given to `write`, even if writing failed."""
        return self._sha256.hexdigest()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if self._error is not None:
                raise OSError(self._error.errno, self._error.strerror, str(self.path)) from None
            faults.point(f"{self._name} written")
            os.fsync(self._file.fileno())
            faults.point(f"{self._name} flushed")


@contextmanager
def replacing(path: Path) -> Iterator[NewFile]:
    """Context manager for a file that replaces `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process with this number, or a link that somebody put there
    try:
        with NewFile(temporary, path.name) as file:
            yield file
        temporary.replace(path)
        faults.point(f"{path.name} renamed")
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some network file systems
            raise
    finally:
        os.close(descriptor)
    faults.point("folder flushed")


def remove_folder(path: Path) -> None:
    """Remove a folder, after renaming it, so that a partly removed one is never used. Failures to remove are warnings.

    Raises:
        OSError: it cannot be renamed.
    """
    renamed = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    path.rename(renamed)
    faults.point(f"{path.name} renamed to be removed")
    clear(renamed)


def clear(leftover: Path) -> None:
    """Remove an unused file, link or folder; a failure is a warning."""
    try:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    except OSError as error:
        _log.warning("%s: cannot be removed (%s); nothing uses it", leftover, error.strerror)


_ADVICE = {
    errno.ENOSPC: "Make room on the disk.",
    errno.EDQUOT: "Remove files, or have the quota raised.",
    errno.EFBIG: "Lift the limit to the size of files (ulimit -f).",
}


def describe_failure(path: Path, error: OSError, needed: int) -> str:
    """An error message: path, reason, needed and free bytes, and advice."""
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
    advice = _ADVICE.get(error.errno or 0, "Make its folder writable, and check the disk.")
    return f"{path}: cannot be written: {error.strerror or error} ({needed:,} bytes needed, {free:,} free). {advice}"


@contextmanager
def indispensable(path: Path, needed: int) -> Iterator[None]:
    """For a block that writes `path`, of about `needed` bytes, which the run needs to finish.

    Raises:
        RunFailed: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunFailed(describe_failure(path, error, needed)) from None
