"""Packed files: a small dataset in one .safetensors file.

Tensors `train.images` uint8 [N, C, H, W] and `train.labels` int64 [N], the same for `test` and, optionally,
`validation`. Metadata: `name`, `classes` (a JSON list of their names, in the order of the labels) and
`sha256/<tensor>`, the digest of a tensor's bytes. Files written here also have a checksum of the whole file, and say so
in `layout`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.errors import InputError
from distill.files.checksum import CHECKSUM, has_right_checksum
from distill.files.plain_data import parse_json
from distill.files.safetensors_file import read_safetensors
from distill.files.tensors import write_tensors


class Expected(NamedTuple):
    """Class count, split sizes and image shape of a known dataset."""

    classes: int
    train: int
    test: int
    shape: tuple[int, int, int]
    """Channels, height, width."""


LAYOUT = "uint8 NCHW, sealed"
PIXELS = "pixels"
"""Key in the metadata: the sizes of the images before they were packed, in words."""
SPLIT_NAMES = ("train", "validation", "test")
PACK_AGAIN = "pack it again"


@dataclass(frozen=True)
class Packed:
    """The content of a packed file; tensors are memory-mapped."""

    path: str
    class_names: tuple[str, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all tensors and the class names; independent of the file's name."""
        parts = [
            f"{key}={self.metadata.get(f'sha256/{key}') or sha256(self.tensors[key])}" for key in sorted(self.tensors)
        ]
        return hashlib.sha256("\n".join([*parts, *self.class_names]).encode()).hexdigest()


def sha256(tensor: Tensor) -> str:
    """Hex digest of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).numpy().data).hexdigest()


def write_packed(
    path: Path,
    *,
    name: str,
    class_names: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a packed file, with digests of the tensors and of the file in its metadata."""
    metadata = {"name": name, "classes": json.dumps(list(class_names)), "layout": LAYOUT, CHECKSUM: "", **(extra or {})}
    write_tensors(path, tensors, metadata | {f"sha256/{key}": sha256(tensor) for key, tensor in tensors.items()})


def open_packed(path: Path, expected: Expected | None = None, *, needs_test: bool = True) -> Packed:
    """Open a packed file and check keys, shapes, dtypes, counts, labels, classes and digests.

    Reads every byte once (about 0.1 s for CIFAR-10); tensors stay memory-mapped. Raises InputError with the file and
    its first problem. `needs_test`: whether there must be a test split.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; put the packed data there, or change data.root or data.name")
    advice = "It is truncated or has another format: delete it and get it again."
    tensors, metadata = read_safetensors(path, "pt", links=True, advice=advice)
    class_names = _class_names(metadata)
    is_whole = has_right_checksum(path, metadata)
    for problem, remedy in problems_of(
        tensors, metadata, class_names, expected, is_whole=is_whole, needs_test=needs_test
    ):
        raise InputError(f"{path}: {problem}; {remedy}")
    return Packed(str(path), class_names, tensors, metadata)


def problems_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    class_names: tuple[str, ...],
    expected: Expected | None,
    *,
    is_whole: bool,
    needs_test: bool = True,
    every_class: bool = True,
) -> Iterator[tuple[str, str]]:
    """Problems and remedies, in order; reading on after the first one may raise. `every_class`: has training images."""
    get_again = "delete the file and get it again"
    required = ("train", "test") if needs_test else ("train",)
    splits = [split for split in SPLIT_NAMES if split in required or f"{split}.images" in tensors]
    if set(tensors) != {f"{split}.{part}" for split in splits for part in ("images", "labels")}:
        yield (
            f"holds the tensors {', '.join(sorted(tensors)) or '(none)'}",
            "a packed dataset has train.images, train.labels, test.images, test.labels and perhaps validation.images, "
            "validation.labels",
        )
    if not class_names:
        yield "its metadata has no 'classes', a JSON list of at least two different names", PACK_AGAIN
    if expected is not None and len(class_names) != expected.classes:
        yield f"names {len(class_names)} classes where this dataset has {expected.classes}", get_again
    for split in splits:
        images, labels = tensors[f"{split}.images"], tensors[f"{split}.labels"]
        if (order := wrong_order(images, len(labels) if labels.ndim == 1 else -1)) is not None:
            yield (
                f"{split}.images is {describe(images)} in the order {order.axes}; images{order.remedy}.contiguous() "
                "has the order [N, C, H, W] that is needed",
                PACK_AGAIN,
            )
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            yield f"{split}.images is {describe(images)}, not uint8 [N, C, H, W]", PACK_AGAIN
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            yield f"{split}.labels is {describe(labels)}, not int64 [{len(images)}] like its images", PACK_AGAIN
        shape = tuple(tensors["train.images"].shape[1:]) if expected is None else expected.shape
        if images.shape[1:] != shape:
            yield f"{split}.images has images of {list(images.shape[1:])} instead of {list(shape)}", get_again
        count = {"train": expected.train, "test": expected.test}.get(split) if expected is not None else None
        if count is not None and len(images) != count:
            yield f"has {len(images)} images in '{split}' where this dataset has {count}", get_again
    for key, tensor in tensors.items():
        stated = metadata.get(f"sha256/{key}")
        if not is_whole and stated is not None and stated != sha256(tensor):
            yield (
                f"the bytes of {key} are not those that were written (SHA-256 differs), so it is damaged or altered",
                get_again,
            )
    for split in splits:
        for label in (int(value) for value in torch.aminmax(tensors[f"{split}.labels"])):
            if not 0 <= label < len(class_names):
                yield (
                    f"label {label} in {split}.labels is out of range: classes are 0 to {len(class_names) - 1}",
                    PACK_AGAIN,
                )
    counts = torch.bincount(tensors["train.labels"], minlength=len(class_names)).tolist()
    if every_class and 0 in counts:
        yield f"class '{class_names[counts.index(0)]}' has no training image", PACK_AGAIN
    if not is_whole and (CHECKSUM in metadata or metadata.get("layout") == LAYOUT):
        yield "its header is not what was written (SHA-256 differs), so it is damaged or altered", get_again


class _Order(NamedTuple):
    """An order of axes, and how to bring it to [N, C, H, W]."""

    axes: str
    remedy: str


def wrong_order(images: Tensor, count: int) -> _Order | None:
    """The order of axes, if by their sizes it is clearly another than [N, C, H, W]; `count`: number of labels."""
    shape = tuple(images.shape)
    if len(shape) == 3 and shape[0] == count:
        return _Order("[N, H, W]", "[:, None]")
    if len(shape) != 4:
        return None
    channels = [axis for axis in range(4) if shape[axis] in (1, 3, 4)]
    if shape[0] == count and 1 not in channels and 3 in channels and (shape[3] > 1 or shape[1] == shape[2]):
        return _Order("[N, H, W, C]", ".permute(0, 3, 1, 2)")
    if shape[3] == count != shape[0]:
        if 2 in channels and 0 not in channels:
            return _Order("[H, W, C, N]", ".permute(3, 2, 0, 1)")
        if 0 in channels and 2 not in channels:
            return _Order("[C, H, W, N]", ".permute(3, 0, 1, 2)")
    return None


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _class_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The class names; empty if they are missing or invalid."""
    try:
        names = parse_json(f'{{"classes": {metadata.get("classes", "null")}}}', "metadata").get("classes")
    except InputError:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if len(set(names)) == len(names) >= 2 else ()
