"""The checksum of a .safetensors file: a SHA-256 of all of it, header and metadata included, kept in its own metadata.

Neither the format nor its library notices a changed byte. The digest is taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

CHECKSUM = "sha256/file"
PLACEHOLDER = "0" * 64
"""Stands in the metadata where the digest goes."""


def has_right_checksum(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the file, whose metadata these are, has a checksum, and every byte is what was written."""
    stated = metadata.get(CHECKSUM, "").encode()
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        if len(stated) != len(PLACEHOLDER) or header.count(stated) != 1:
            return False
        digest = hashlib.sha256(size + header.replace(stated, PLACEHOLDER.encode()))
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest().encode() == stated
