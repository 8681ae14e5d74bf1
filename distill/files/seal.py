"""The seal of a .safetensors file: a SHA-256 of all of it, header and metadata included, kept in its own metadata.

Neither the format nor its library notices a changed byte. The digest is taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

SEAL = "sha256/file"
UNSEALED = "0" * 64
"""Stands in the metadata where the digest goes."""


def is_sealed(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the file, whose metadata these are, has a seal, and every byte is what was written."""
    stated = metadata.get(SEAL, "").encode()
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        if len(stated) != len(UNSEALED) or header.count(stated) != 1:
            return False
        digest = hashlib.sha256(size + header.replace(stated, UNSEALED.encode()))
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest().encode() == stated
