"""Text for files and consoles: written whole or not at all, and with no name in it that could do anything."""

from __future__ import annotations

import html
import re
from pathlib import Path

from distill.files.durable import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, under another name first, flushed to disk, then renamed."""
    with replacing(path) as file:
        file.write(text.encode())


def visible(text: str) -> str:
    """The text, with escapes in the place of what does not print, except for line breaks and tabs: what steers a
    terminal, turns the direction of writing, or is the part of a file's name that is no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def markdown(text: str) -> str:
    """The text as itself in one line of Markdown, or one cell of its tables: no HTML, link, image, code or emphasis."""
    line = html.escape(" ".join(visible(text).split("\n")), quote=False)
    return re.sub(r"([\\`*\[\]|!~])", r"\\\1", line)
