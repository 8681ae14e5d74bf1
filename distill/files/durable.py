"""Files and folders that a crash, of the process or of the machine, leaves whole or not there."""

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
    """A file that is being written; on the disk once its block ends. Not atomic by itself.

    An error waits for the end of the block: `torch.save` would turn it into one of its own.

    Raises:
        OSError: at the end of the block; it names the path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self._name = name or path.name
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None
        self._file = path.open("wb", buffering=0)
        faults.point(f"{self._name} opened")

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; unbuffered, so that what fails and what a crash leaves are as they look."""
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
        """Asked for by `torch.save`; nothing waits here."""

    def sha256(self) -> str:
        """Of what was given to `write`, whatever became of it."""
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
    """A file that takes the place of `path` when the block ends well; otherwise nothing changes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with NewFile(temporary, path.name) as file:
            yield file
        temporary.replace(path)
        faults.point(f"{path.name} renamed")
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(path: Path) -> None:
    """Put on the disk which names are in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)
    faults.point("folder flushed")


def remove_folder(path: Path) -> None:
    """Remove a folder: renamed first, so that no part of it is ever taken for the whole. What cannot be removed then
    is a warning.

    Raises:
        OSError: it cannot be renamed and stands where it stood.
    """
    doomed = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    path.rename(doomed)
    faults.point(f"{path.name} renamed to be removed")
    clear(doomed)


def clear(leftover: Path) -> None:
    """Remove a file, a link or a folder that nobody looks for; what cannot be removed is a warning."""
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
    """What could not be written, why, the bytes it takes, and what to change."""
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
    advice = _ADVICE.get(error.errno or 0, "Make its folder writable, on a disk in order.")
    return f"{path}: cannot be written: {error.strerror or error} ({needed:,} bytes needed, {free:,} free). {advice}"


@contextmanager
def indispensable(path: Path, needed: int) -> Iterator[None]:
    """A block that writes `path`, of about so many bytes, without which the run cannot end well.

    Raises:
        RunFailed: it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise RunFailed(describe_failure(path, error, needed)) from None
