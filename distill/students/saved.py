"""Reading and verifying the files of an export folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distill.errors import InputError
from distill.files.checksum import has_right_checksum
from distill.files.digests import state_digest
from distill.files.plain_data import MOST_BYTES, parse_json
from distill.files.records import Environment, ExportConfig, check
from distill.files.regular import read_bytes
from distill.files.safetensors_file import read_safetensors

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
        InputError: a file is missing, unreadable or modified, or its content is not what an export holds.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: no such file. An exported student is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
            )
    # Links are followed: the Hugging Face Hub's client keeps its files behind them.
    weights, metadata = read_safetensors(folder / WEIGHTS_FILE, "pt", links=True, advice="Export the student again.")
    text = read_bytes(folder / CONFIG_FILE, MOST_BYTES, links=True) or b""
    digests = {
        WEIGHTS_FILE: (metadata.get(WEIGHTS_DIGEST), state_digest(weights)),
        CONFIG_FILE: (metadata.get(CONFIG_DIGEST), hashlib.sha256(text).hexdigest()),
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
    config = parse_json(text, str(folder / CONFIG_FILE))
    check(ExportConfig, config, str(folder / CONFIG_FILE))
    return Saved(config, weights, metadata)


def config_digest(folder: Path) -> str:
    """SHA-256 (hex) of config.json."""
    return hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest()


def variants_in(metadata: Mapping[str, str], source: str) -> dict[str, str]:
    """Origins of the variants that are not built in, from the metadata of the weights file `source`.

    Raises:
        InputError: they are not what was written.
    """
    text = f'{{"variants": {metadata.get("variants", "{}")}}}'
    return check(Environment, parse_json(text, source), source).variants
