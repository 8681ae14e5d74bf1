"""Reading JSON and YAML of bounded size and depth, from files that somebody else may have written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files.regular import read_bytes
from distill.recipe.reading import MAX_DEPTH, mapping_of, short

MOST_BYTES = 4 << 20
"""Of a JSON text."""
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it does not exist. A link is not followed.

    Raises:
        InputError: as `read_bytes` and `parse_json`.
    """
    text = read_bytes(path, MOST_BYTES)
    return None if text is None else parse_json(text, str(path))


def read_resolved(path: Path) -> dict[str, Any] | None:
    """The recipe in `resolved.yaml` of the run directory at `path`, unchecked; None without one.

    Raises:
        InputError: it cannot be read, is no YAML mapping, or names a base, which a resolved recipe does not.
    """
    file = path / "resolved.yaml"
    if (text := read_bytes(file, MOST_BYTES)) is None:
        return None
    raw = mapping_of(text, str(file))
    if "base" in raw:
        raise InputError(f"{file}: base: a resolved recipe has none. It is not what was written.")
    return {str(key): value for key, value in raw.items()}


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`: bounded, and without what would fail later, far from the file that it comes from.

    Raises:
        InputError: it is no JSON or no object, longer than `MOST_BYTES`, nested more than `MAX_DEPTH` deep, has a key
            twice, an integer of more than 64 bits, or half a surrogate pair; the message begins with `source`.
    """
    try:
        if len(text) > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES:,} bytes")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_bounded)
        _check(value, MAX_DEPTH)
    except RecursionError:
        raise InputError(f"{source}: not valid JSON: {_TOO_DEEP}.") from None
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON: {short(str(error))}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: a JSON object is expected, not a {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key '{key}'")
    return found


def _bounded(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"an integer of {len(digits)} digits")
    return number


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        value.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError(_TOO_DEEP)
        for item in value if isinstance(value, list) else (*value, *value.values()):
            _check(item, depth - 1)
