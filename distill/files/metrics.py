"""`metrics.jsonl`: one JSON object a line, whatever happened while a line was written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from distill import faults
from distill.files.text import parse_json


class MetricsFile:
    """Appends whole lines. What a full disk refuses waits in memory and goes before the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line. Raises OSError where it has to wait."""
        self._waiting += json.dumps(line).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            self._write(file)
        faults.point(f"{line['event']} line")

    def sync(self) -> None:
        """Write what waits and put it all on the disk. Raises OSError."""
        with self.path.open("ab", buffering=0) as file:
            self._write(file)
            os.fsync(file.fileno())

    def _write(self, file: FileIO) -> None:
        size, rest = file.tell(), memoryview(self._waiting)
        try:
            while len(rest):
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)  # no half line
            raise
        self._waiting = b""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def repair(self) -> None:
        """Cut off the last line if it is torn."""
        if self.size:
            content = self.path.read_bytes()
            self.cut(content.rfind(b"\n") + 1)

    def cut(self, size: int) -> None:
        """Cut the file back to so many bytes."""
        if self.size > size:
            os.truncate(self.path, size)


def read_lines(path: Path, *, finished: bool = False) -> Iterator[dict[str, Any]]:
    """The lines in order; none where there is no file. A torn last one, of a run that was killed or goes on, is not
    there yet; in the file of a `finished` run it is damage.

    Raises:
        InputError: a line is damaged.
    """
    if path.exists():
        *lines, torn = path.read_bytes().split(b"\n")
        for number, line in enumerate([*lines, torn] if torn and finished else lines, start=1):
            yield parse_json(line, f"{path}, line {number}")
