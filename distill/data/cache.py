"""The cache folder: what is made from data, never written beside them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from distill.errors import InputError

REMEDY = "set data.cache or the environment variable DISTILL_CACHE to a writable folder with room"


def cache_folder(chosen: str | None) -> Path:
    """`data.cache`, else `$DISTILL_CACHE`, else `distill` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Raises:
        InputError: there is no home folder.
    """
    if folder := chosen or os.environ.get("DISTILL_CACHE"):
        return Path(folder).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores relative paths
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise InputError(f"data.cache: there is no home folder for a cache; {REMEDY}")
    return Path(base) / "distill"


def cached_file(folder: Path, root: Path, rules: object, suffix: str) -> Path:
    """The file in a cache folder for what is made from the data at `root` by some `rules` (plain data)."""
    key = hashlib.sha256(json.dumps([os.path.realpath(root), rules]).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", root.resolve().name)[:60].strip(".-") or "data"
    return folder / f"{name}-{key}{suffix}"


def files_identity(root: Path, files: Iterable[Path], salt: str = "") -> str:
    """SHA-256 (hex) over `salt` and the files' paths, below `root` relative to it, sizes and modification times.

    Raises:
        OSError: one of them cannot be reached.
    """
    state = hashlib.sha256(salt.encode(errors="surrogateescape"))
    for path in files:
        status = path.stat()
        name = path.relative_to(root) if path.is_relative_to(root) else path
        state.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return state.hexdigest()
