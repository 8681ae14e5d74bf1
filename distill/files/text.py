"""Text and JSON of files and consoles: written whole or not at all, and with no name in it that could do anything."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files.durable import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, under another name first, flushed to disk, then renamed."""
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    return parse_json(text, str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        InputError: it is no JSON, or no object; the message begins with `source`.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: a JSON object is expected, not a {type(value).__name__}.")
    return value


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
