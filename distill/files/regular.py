"""Opens regular files only: no links, devices or pipes, for files in folders that somebody else may have made."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import InputError

UNREACHABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EEXIST,
               errno.EISDIR)  # fmt: skip


def regular(path: str, flags: int) -> int:
    """Opener for `open(..., opener=regular)`: the file descriptor of a regular file; links are not followed.

    A file that is opened to be changed must have no other name (a hard link). Use no mode that truncates.

    Raises:
        OSError: it is something else; or as `os.open`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from None
        raise
    status, changes = os.fstat(descriptor), flags & (os.O_WRONLY | os.O_RDWR)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "it is no regular file"
    elif changes and status.st_nlink > 1:
        problem = "it is a hard link of another file"
    if problem is not None:
        os.close(descriptor)
        raise OSError(errno.ELOOP, problem, str(path))
    return descriptor


def read_bytes(path: Path, most: int, *, links: bool = False) -> bytes | None:
    """The content of a regular file; None if it does not exist.

    Args:
        most: bytes of the largest file that is read.
        links: whether they are followed.

    Raises:
        InputError: it cannot be read, is no regular file, or is larger.
    """
    try:
        with open(os.path.realpath(path) if links else path, "rb", opener=regular) as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read: {reason}. It should be a file that you may read.") from None
    if len(content) > most:
        raise InputError(f"{path}: larger than {most:,} bytes, so it is not what belongs there.")
    return content


@contextmanager
def reachable(while_: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, and while the condition holds, a path that cannot be looked at or written raises InputError.

    `Path.exists` and others raise OSError for the folder of another user, or for a long name.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNREACHABLE or error.filename is None or not while_():
            raise
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        raise InputError(
            f"{path}: cannot be used: {error.strerror}. Give another path, or make it accessible."
        ) from None
    except RuntimeError as error:  # of Path.resolve
        if "Symlink loop" not in str(error):
            raise
        raise InputError(f"{error}. Give another path.") from None


def check_no_links(*folders: Path) -> None:
    """Raise InputError if one of these is a link: what is written into it would go elsewhere."""
    for folder in folders:
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link, which is not followed. Replace it by the folder itself.")
