"""Checksum of a .safetensors file: a SHA-256 of the whole file, header included, in its own metadata.

The format itself does not detect changed bytes. The digest is computed with zeros in its own position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

CHECKSUM = "sha256/file"
PLACEHOLDER = "0" * 64
"""In the metadata while the digest is computed."""


def has_right_checksum(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the file with this metadata has a checksum, and it is correct."""
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
