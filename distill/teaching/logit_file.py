"""Float16 logits in one memory-mapped file, with a checksum per record.

A record is a 32-bit checksum and the logits [classes]. Records are ordered by epoch, then by position in the epoch's
order: a micro-batch is contiguous, and a longer run appends. The checksum is a hash of the logits' bits, the epoch, the
position and the file's key; a record that was never written, is incomplete after a crash, or is damaged fails it and
counts as missing.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distill.data.locking import one_at_a_time
from distill.errors import InputError
from distill.files.regular import regular
from distill.files.text import write_text

_log = logging.getLogger("distill")


class LogitFile:
    """The records of `epochs` epochs of `samples` samples; `key` is the SHA-256 (hex) of what they depend on.

    Before `open` it is empty, and writes are dropped.
    """

    def __init__(self, path: Path, key: str, *, epochs: int, samples: int, classes: int) -> None:
        self.path = path
        self.key = key
        self._dtype = np.dtype([("check", "<u4"), ("logits", "<f2", (classes,))])
        self._shape = (epochs, samples)
        self.size = epochs * samples * self._dtype.itemsize
        # Multilinear hashing (Thorup, arXiv 1504.06804): the upper 32 bits of a sum of products with random 64-bit
        # words. Two records that differ, however they differ, have the same check for one choice of words in 2**32.
        words = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * (classes + 3)), "<u8")
        self._constant, self._of_epoch, self._of_position, self._of_logits = words[0], words[1], words[2], words[3:]
        self._records: np.ndarray | None = None
        self._writable = False
        self._warned = False

    @property
    def missing(self) -> int:
        """Bytes by which the file is too short; its size if it does not exist."""
        return max(0, self.size - (self.path.lstat().st_size if self.path.exists() else 0))

    def check_space(self) -> None:
        """Raise InputError unless there is disk space for the missing bytes."""
        folder = next(parent for parent in self.path.absolute().parents if parent.exists())
        needed, free = self.missing, shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"teacher.cache: {self.path} needs {needed:,} bytes, and {free:,} are free there. Free some, launch "
                "from a folder on another disk, or set teacher.cache=false."
            )

    def make(self, description: str) -> None:
        """Create or extend the file; all of its space is allocated at once.

        `description` is written beside it as .json. Raises InputError without disk space.
        """
        if not self.missing:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with one_at_a_time(self.path, "launch from a folder that can be written, or set teacher.cache=false"):
                if not self.missing:
                    return
                self.check_space()
                _log.info("teacher cache: allocating %.1f MB for %s", self.missing / 1e6, self.path)
                if self.path.exists():
                    _extend(self.path, self.size)
                    return
                temporary = self.path.with_name(f".{self.path.name}.tmp")
                temporary.unlink(missing_ok=True)
                try:
                    temporary.touch(exist_ok=False)
                    _extend(temporary, self.size)
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)
                write_text(self.path.with_suffix(".json"), description)
        except OSError as error:
            raise InputError(
                f"teacher.cache: {self.path} of {self.size:,} bytes cannot be created ({error.strerror or error}). "
                "Launch from a folder that has room and can be written, or set teacher.cache=false."
            ) from None

    def open(self) -> None:
        """Map the file; on a machine that does not see it, it is empty. Raises InputError if it is a link."""
        if self.missing:
            return
        try:
            with open(self.path, "rb", opener=regular) as file:
                self._records = np.memmap(file, self._dtype, "r", shape=self._shape)
        except OSError as error:
            raise InputError(
                f"teacher.cache: {self.path} cannot be read ({error.strerror}). Move it away, or set "
                "teacher.cache=false."
            ) from None
        self._writable = True

    def read(self, epoch: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Logits float16 [B, classes] of the positions `part` of an epoch, and which of them are stored, bool [B]."""
        if self._records is None:
            rows = np.zeros(part.stop - part.start, self._dtype)
        else:
            rows = np.array(self._records[epoch, part])  # a copy, since another process may write
        logits, written = rows["logits"], rows["check"] != 0
        found = written & (rows["check"] == self._checks(logits, epoch, part.start))
        if not self._warned and ((written | logits.view("<u2").any(1)) & ~found).any():
            self._warned = True
            _log.warning("%s: damaged, first seen in epoch %d; such records are computed again", self.path, epoch)
        return logits, found

    def write(self, ranges: Iterable[tuple[int, int, np.ndarray]]) -> None:
        """Store each (epoch, first position, logits float16 [B, classes]). A failure is a warning, after which nothing
        more is written.
        """
        if not self._writable:
            return
        try:
            # Not through the map: on a full disk that would kill the process. Incomplete records count as missing.
            with open(self.path, "r+b", buffering=0, opener=regular) as file:
                for epoch, start, logits in ranges:
                    rows = np.zeros(len(logits), self._dtype)
                    finite = np.isfinite(logits).all(1)  # others stay missing
                    rows["logits"][finite] = logits[finite]
                    rows["check"][finite] = self._checks(rows["logits"], epoch, start)[finite]
                    offset = (epoch * self._shape[1] + start) * self._dtype.itemsize
                    os.pwrite(file.fileno(), rows.tobytes(), offset)
        except OSError as error:
            self._writable = False
            _log.warning("%s: cannot be written (%s); nothing more is stored", self.path, error.strerror)

    def _checks(self, logits: np.ndarray, epoch: int, start: int) -> np.ndarray:
        """uint32 [B], never 0, which marks a record that was not written."""
        positions = np.arange(start, start + len(logits), dtype=np.uint64)
        sums = logits.view("<u2").astype(np.uint64) @ self._of_logits
        sums += positions * self._of_position + np.array([epoch], np.uint64) * self._of_epoch + self._constant
        return np.maximum((sums >> np.uint64(32)).astype(np.uint32), 1)


def _extend(path: Path, size: int) -> None:
    """Extend to `size` bytes, or not at all."""
    with open(path, "r+b", opener=regular) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.truncate(before)
            raise
