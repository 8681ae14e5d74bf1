"""`metrics.jsonl`: one JSON object per line, robust to crashes and full disks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from distill import faults
from distill.files.plain_data import parse_json
from distill.files.records import Line, check
from distill.files.regular import read_bytes, regular

MOST_BYTES = 1 << 30
"""Of a file that is read."""


class MetricsFile:
    """Appends whole lines. Lines that cannot be written are kept in memory and written before the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line. Raises OSError if it cannot be written yet."""
        self._waiting += json.dumps(line).encode() + b"\n"
        with open(self.path, "ab", buffering=0, opener=regular) as file:
            self._write(file)
        faults.point(f"{line['event']} line")

    def sync(self) -> None:
        """Write pending lines and flush to disk. Raises OSError."""
        with open(self.path, "ab", buffering=0, opener=regular) as file:
            self._write(file)
            os.fsync(file.fileno())

    def _write(self, file: FileIO) -> None:
        size, rest = file.tell(), memoryview(self._waiting)
        try:
            while len(rest):
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)  # no partial line
            raise
        self._waiting = b""

    @property
    def size(self) -> int:
        try:
            return self.path.lstat().st_size
        except FileNotFoundError:
            return 0

    def repair(self) -> None:
        """Remove an incomplete last line."""
        if self.size:
            with open(self.path, "rb", opener=regular) as file:
                content = file.read()
            self.cut(content.rfind(b"\n") + 1)

    def cut(self, size: int) -> None:
        """Truncate the file to `size` bytes."""
        if self.size > size:
            with open(self.path, "r+b", buffering=0, opener=regular) as file:
                file.truncate(size)


def read_lines(path: Path, *, finished: bool = False) -> Iterator[dict[str, Any]]:
    """The lines in order; none if there is no file. An incomplete last line is ignored, except that in a `finished` run
    it is damage.

    Raises:
        InputError: a line is damaged.
    """
    *lines, last = (read_bytes(path, MOST_BYTES) or b"").split(b"\n")
    for number, line in enumerate([*lines, last] if last and finished else lines, start=1):
        where = f"{path}, line {number}"
        check(Line, parsed := parse_json(line, where), where)
        yield parsed
