"""The list of shards of a webdataset."""

from __future__ import annotations

from pathlib import Path

from distill.files.plain_data import MOST_BYTES, parse_json
from distill.files.records import ShardList, check
from distill.files.regular import read_bytes

FILES = ("_info.json", "info.json")
"""Of which timm reads the first."""


def check_list(root: Path) -> None:
    """Check the list before timm reads it, as it is.

    Raises:
        InputError: it is no JSON, too large or too deep, or holds something else than a list of shards.
    """
    for path in (root / name for name in FILES):
        if (content := read_bytes(path, MOST_BYTES, links=True)) is not None:
            check(ShardList, parse_json(content, str(path)), str(path))
            return
