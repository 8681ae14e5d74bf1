"""Text and JSON files, and escaping for consoles and Markdown."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files.durable import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it does not exist.

    Raises:
        InputError: it cannot be read or is no JSON object.
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
