"""Writing text files whole or not at all."""

from __future__ import annotations

from pathlib import Path

from distill.durable import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, under another name first, flushed to disk, then renamed."""
    with replacing(path) as file:
        file.write(text.encode())
