"""Float16 logits in one memory-mapped file, each record with a check of its own: what is not whole is not there.

A record is a 32-bit check and the logits [classes]. Records stand by epoch, then by position in the epoch's order: a
micro-batch is one stretch of the file, and a longer run appends. The check is a hash of the logits' bits, the epoch,
the position and the file's key; a record that was never written, was torn by a crash, or is damaged fails it and
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

_log = logging.getLogger("distill")


class LogitFile:
    """The records of `epochs` epochs of `samples` samples; `key` is the SHA-256 (hex) of what they depend on.

    Until `open` nothing is in it, and what is written is dropped.
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
        """Bytes by which the file is too short, all of them where there is none."""
        return max(0, self.size - (self.path.stat().st_size if self.path.exists() else 0))

    def check_space(self) -> None:
        """Raise InputError unless the disk has room for what is missing of the file."""
        folder = next(parent for parent in self.path.absolute().parents if parent.exists())
        needed, free = self.missing, shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"teacher.cache: {self.path} needs {needed:,} bytes, and {free:,} are free there. Free some, launch "
                "from a folder on another disk, or set teacher.cache=false."
            )

    def make(self, description: str) -> None:
        """Make the file, or lengthen it, where it is missing or short; all of its space is taken at once.

        `description`, beside it as .json, says what the key is made of. Raises InputError where there is no room.
        """
        if not self.missing:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with one_at_a_time(self.path):
                if not self.missing:
                    return
                self.check_space()
                _log.info("teacher cache: taking %.1f MB for %s", self.missing / 1e6, self.path)
                if self.path.exists():
                    _lengthen(self.path, self.size)
                    return
                temporary = self.path.with_name(f".{self.path.name}.tmp")
                try:
                    temporary.write_bytes(b"")
                    _lengthen(temporary, self.size)
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)
                self.path.with_suffix(".json").write_text(description, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"teacher.cache: {self.path} of {self.size:,} bytes cannot be made ({error.strerror or error}). Launch "
                "from a folder that has room and can be written, or set teacher.cache=false."
            ) from None

    def open(self) -> None:
        """Map the file, where this machine sees it; a machine that does not finds nothing in it."""
        if self.missing:
            return
        self._records = np.memmap(self.path, self._dtype, "r", shape=self._shape)
        self._writable = True

    def read(self, epoch: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Logits float16 [B, classes] of the positions `part` of an epoch, and which of them are there, bool [B]."""
        if self._records is None:
            rows = np.zeros(part.stop - part.start, self._dtype)
        else:
            rows = np.array(self._records[epoch, part])  # a copy: what is checked is what is used
        logits, written = rows["logits"], rows["check"] != 0
        found = written & (rows["check"] == self._checks(logits, epoch, part.start))
        if not self._warned and ((written | logits.view("<u2").any(1)) & ~found).any():
            self._warned = True
            _log.warning("%s: damaged, first seen in epoch %d; such records are computed anew", self.path, epoch)
        return logits, found

    def write(self, stretches: Iterable[tuple[int, int, np.ndarray]]) -> None:
        """Store (epoch, first position, logits float16 [B, classes]) each. A file that cannot be written any more is
        left as it is, with a warning: a run does not end over its cache.
        """
        if not self._writable:
            return
        try:
            # Not through the map: on a full disk that would kill the process. What this cuts short counts as missing.
            with self.path.open("r+b", buffering=0) as file:
                for epoch, start, logits in stretches:
                    rows = np.zeros(len(logits), self._dtype)
                    finite = np.isfinite(logits).all(1)  # the rest stays missing: a teacher may be asked again
                    rows["logits"][finite] = logits[finite]
                    rows["check"][finite] = self._checks(rows["logits"], epoch, start)[finite]
                    offset = (epoch * self._shape[1] + start) * self._dtype.itemsize
                    os.pwrite(file.fileno(), rows.tobytes(), offset)
        except OSError as error:
            self._writable = False
            _log.warning("%s: cannot be written (%s); nothing more is stored", self.path, error.strerror)

    def _checks(self, logits: np.ndarray, epoch: int, start: int) -> np.ndarray:
        """uint32 [B], none of them 0, which marks a record never written."""
        positions = np.arange(start, start + len(logits), dtype=np.uint64)
        sums = logits.view("<u2").astype(np.uint64) @ self._of_logits
        sums += positions * self._of_position + np.array([epoch], np.uint64) * self._of_epoch + self._constant
        return np.maximum((sums >> np.uint64(32)).astype(np.uint32), 1)


def _lengthen(path: Path, size: int) -> None:
    """All of it or nothing."""
    with path.open("r+b") as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.truncate(before)
            raise
