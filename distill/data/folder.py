"""Image folders: root/train/<class>/..., and root/val (or validation) and root/test likewise.

Classes are the folders of train, sorted by name; files are ordered by class, then by path. Where there is only one of
val and test, as in ImageNet's layout, it is the test split, and validation is held out of train.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.images import common_mode, decode, to_square
from distill.data.locking import one_at_a_time
from distill.data.packed import Packed, open_packed, write_packed
from distill.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
LAYOUT = "an image folder is train/<class>/*.png and test/<class>/*.png (or val/<class>/*.png), in PNG, JPEG, WebP, ..."


class ImageFiles:
    """Labelled image files, opened by row. Paths are kept as one array: worker processes share it instead of copying
    it bit by bit.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(bytes(self._paths[row]))

    def load(self, row: int, mode: str | None) -> Image.Image:
        """Decoded; InputError naming the file if that is impossible."""
        path = self.path(row)
        return decode(path, str(path), mode)


@dataclass(frozen=True)
class Folder:
    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, ImageFiles]

    @property
    def mode(self) -> str:
        """'L' if the first training image of every class is greyscale, else 'RGB'."""
        files = self.splits["train"]
        first_rows = torch.searchsorted(files.labels, torch.arange(len(self.class_names)))
        return common_mode(files.load(int(row), None) for row in first_rows)

    @property
    def num_images(self) -> int:
        return sum(len(files) for files in self.splits.values())

    def digest(self, contents: bool) -> str:
        """SHA-256 (hex) over all paths; with `contents` over sizes and times of change too, which costs a look at
        each file.
        """
        state = hashlib.sha256()
        for split, files in self.splits.items():
            for row in range(len(files)):
                path = files.path(row)
                state.update(f"{split}\0{path.relative_to(self.root)}\0".encode(errors="surrogateescape"))
                if contents:
                    status = path.stat()
                    state.update(f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return state.hexdigest()


def scan(root: Path) -> Folder:
    """List an image folder. InputError if it is none."""
    found = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    if "train" not in found or len(found) == 1:
        raise InputError(
            f"data.root: {root} has no {'train' if 'train' not in found else 'test or val'} folder; {LAYOUT}"
        )
    validation = found.get("val", found.get("validation"))
    folders = {"train": found["train"], "validation": validation, "test": found.get("test", validation)}
    if "test" not in found:
        del folders["validation"]
    class_names = tuple(
        sorted(entry.name for entry in os.scandir(found["train"]) if entry.is_dir() and not entry.name.startswith("."))
    )
    if len(class_names) < 2:
        raise InputError(
            f"data.root: {found['train']} has {len(class_names)} class folder(s), at least two are needed; {LAYOUT}"
        )
    splits = {name: _list(root, folder, class_names) for name, folder in folders.items() if folder is not None}
    counts = torch.bincount(splits["train"].labels, minlength=len(class_names)).tolist()
    if 0 in counts:
        raise InputError(f"data.root: {found['train'] / class_names[counts.index(0)]} holds no image; {LAYOUT}")
    return Folder(root, class_names, splits)


def _list(root: Path, folder: Path, class_names: tuple[str, ...]) -> ImageFiles:
    present = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    if unknown := sorted(present - set(class_names)):
        raise InputError(
            f"data.root: {folder / unknown[0]} is a class that the train folder does not have; remove or rename it"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        files = [
            os.path.relpath(os.path.join(place, file), root)
            for place, _, names in os.walk(folder / name)
            for file in names
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
        ]
        paths += sorted(files)
        labels += [label] * len(files)
    if not paths:
        raise InputError(f"data.root: {folder} holds no image; {LAYOUT}")
    return ImageFiles(root, paths, labels)


def open_folder(folder: Folder, resolution: int) -> Packed:
    """The folder's images at one size (shorter side resized, centre cut out) from
    `<root>/packed-<resolution>.safetensors`.

    The file carries the digest of the folder it was made of; it is made where it is missing or where the folder has
    changed since.
    """
    path = folder.root / f"packed-{resolution}.safetensors"
    source = folder.digest(contents=True)
    packed = open_packed(path) if path.exists() else None
    if packed is None or packed.metadata.get("source") != source:
        with one_at_a_time(path):
            packed = open_packed(path) if path.exists() else None
            if packed is None or packed.metadata.get("source") != source:
                _pack(folder, path, resolution, source)
        packed = open_packed(path)
    return packed


def _pack(folder: Folder, path: Path, resolution: int, source: str) -> None:
    mode = folder.mode
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes without holding Python's lock
        for split, files in folder.splits.items():
            images = torch.empty(len(files), 1 if mode == "L" else 3, resolution, resolution, dtype=torch.uint8)

            def fill(row: int, files: ImageFiles = files, images: Tensor = images) -> None:
                images[row] = to_square(files.load(row, mode), resolution, None)

            for _ in pool.map(fill, range(len(files))):
                pass
            tensors |= {f"{split}.images": images, f"{split}.labels": files.labels}
    write_packed(path, name=folder.root.name, class_names=folder.class_names, tensors=tensors, extra={"source": source})
