"""Atomic and deterministic writing of .safetensors files.

The library's own writer has a random order of metadata, private file permissions, and unspecific errors on a full
disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill.files.checksum import CHECKSUM, PLACEHOLDER
from distill.files.durable import NewFile, replacing

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `path` atomically."""
    with replacing(path) as file:
        fill(file, tensors, metadata)


def fill(file: NewFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` and `metadata` to a new file in safetensors format; a key CHECKSUM in `metadata` gets the file's
    checksum.
    """
    metadata = metadata or {}
    if CHECKSUM in metadata:
        digest = hashlib.sha256()
        for part in _parts(tensors, {**metadata, CHECKSUM: PLACEHOLDER}):
            digest.update(part)
        metadata = {**metadata, CHECKSUM: digest.hexdigest()}
    for part in _parts(tensors, metadata):
        file.write(part)


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The size of the header (8 bytes, little-endian), the header as JSON, the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Wide elements first, as in the library, for aligned tensors.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        described = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = described | {"data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded = encoded.ljust(-len(encoded) // 8 * -8)
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for name in names:
        values = tensors[name].detach().cpu().contiguous()
        yield values.reshape(-1).view(torch.uint8).numpy().data
