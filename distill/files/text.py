"""Text files, and escaping for consoles and Markdown."""

from __future__ import annotations

import html
import re
from pathlib import Path

from distill.files.durable import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def visible(text: str) -> str:
    """The text with unprintable characters escaped, except line breaks and tabs: control characters, bidirectional
    overrides, and parts of file names that are no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def markdown(text: str) -> str:
    """The text escaped for one line of Markdown or a table cell."""
    line = html.escape(" ".join(visible(text).split("\n")), quote=False)
    return re.sub(r"([\\`*\[\]|!~])", r"\\\1", line)
