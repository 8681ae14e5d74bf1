"""Reading and verifying the files of an export folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.errors import InputError
from distill.files.checksum import has_right_checksum
from distill.files.digests import state_digest

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Keys in the metadata of the weights file; safetensors and JSON have no checksums.
WEIGHTS_DIGEST = "sha256/weights"
CONFIG_DIGEST = "sha256/config"


class Saved(NamedTuple):
    config: dict[str, Any]
    """config.json, in timm's format."""
    weights: dict[str, Tensor]
    """The state dict, on the CPU."""
    metadata: dict[str, str]
    """Of the weights file."""


def read_export(folder: str | Path) -> Saved:
    """Read and verify an export folder.

    Raises:
        InputError: a file is missing, unreadable or modified.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: no such file. An exported student is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
            )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE}: cannot be read ({error}). Export the student again.") from None
    digests = {
        WEIGHTS_FILE: (metadata.get(WEIGHTS_DIGEST), state_digest(weights)),
        CONFIG_FILE: (metadata.get(CONFIG_DIGEST), config_digest(folder)),
    }
    for name, (written, found) in digests.items():
        if written is None:
            raise InputError(
                f"{folder / WEIGHTS_FILE}: not an export of this project: its metadata hold no hash of {name}."
            )
        if written != found:
            raise InputError(f"{folder / name}: not what was exported: its hash differs. Export the student again.")
    if not has_right_checksum(folder / WEIGHTS_FILE, metadata):
        raise InputError(f"{folder / WEIGHTS_FILE}: its header is not what was exported. Export the student again.")
    return Saved(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), weights, metadata)


def config_digest(folder: Path) -> str:
    """SHA-256 (hex) of config.json."""
    return hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest()
