"""What `distill init` finds in a folder of images, and a sample of them to measure with."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from distill.data.dataset import Dataset
from distill.data.facts import range_of
from distill.data.folder import open_files, scan
from distill.data.image_files import Folder, ImageFiles
from distill.data.images import ImageRules, header_fault, is_grey, size_of
from distill.data.opening import Opening
from distill.errors import InputError
from distill.recipe import Data
from distill.scaffold.rules import Images

LOOKED_AT = 256
"""Images whose headers are read."""
SAMPLE = 1024
"""Images that are decoded to measure with."""


class Found(NamedTuple):
    folder: Folder
    images: Images
    sizes: list[tuple[int, int]]
    """Width and height of the images that were looked at."""
    left_out: tuple[str, ...]
    """Files that are no images or cannot be read, each with the reason; further ones may be damaged."""

    def lines(self) -> list[tuple[str, str]]:
        """Facts for the console: keys and values."""
        images, counts = self.images, self.images.counts
        colours, looked = "greyscale" if images.grey else "colour", len(self.sizes)
        of_each = f"{min(counts.values()):,} to {max(counts.values()):,} training images each"
        splits = ", ".join(f"{name} {len(files):,}" for name, files in self.folder.splits.items())
        return [
            ("data", f"{self.folder.root}, {self.folder.num_images:,} images: {splits}"),
            ("classes", f"{len(counts)}, {of_each}: {', '.join(list(counts)[:8])}{', ...' if len(counts) > 8 else ''}"),
            ("images", f"{colours}, {range_of(set(self.sizes))} (of {looked} looked at)"),
        ]


def look_at(root: Path) -> Found:
    """Scan the folder, and the headers of some of its training images.

    Raises:
        InputError: it is no image folder of two classes or more, or none of the images can be read.
    """
    try:
        split = root.is_dir() and any((root / name).is_dir() for name in ("test", "val", "validation"))
        folder = scan(root, skip=True, test=not (split and (root / "train").is_dir()))
    except InputError as error:
        raise InputError(str(error).removeprefix("data.root: ").partition("; or, for images in")[0]) from None
    files, rules = folder.splits["train"], ImageRules()
    left_out, sizes, grey = list(folder.left_out), [], True
    for row in _spread(len(files), LOOKED_AT):
        path = files.path(row)
        if (fault := header_fault(path, rules)) is not None:
            left_out.append(f"{path}: {fault}")
            continue
        sizes.append(size_of(path, str(path), rules))
        grey = grey and is_grey(path, str(path), rules)
    if not sizes:
        raise InputError(f"{root}: none of its images can be read, such as {left_out[-1]}.")
    numbers = torch.bincount(files.labels, minlength=len(folder.class_names)).tolist()
    images = Images(
        counts=dict(zip(folder.class_names, numbers, strict=True)),
        validation=_size(folder, "validation"),
        test=_size(folder, "test"),
        side=int(statistics.median(min(size) for size in sizes)),
        stretch=statistics.median(max(size) / min(size) for size in sizes),
        grey=grey,
    )
    return Found(folder, images, sizes, tuple(left_out))


def open_sample(found: Found, data: Data, device: torch.device, cache: Path) -> Dataset:
    """A dataset of evenly spread training images, as the recipe's, packed in the folder `cache`.

    Its test split has the first images of its training split. What cannot be decoded is left out, as its info says.
    """
    files = found.folder.splits["train"]
    train = _rows(files, _spread(len(files), SAMPLE))
    splits = {"train": train, "test": _rows(files, [0, len(files) - 1])}
    folder = Folder(found.folder.root, found.folder.class_names, splits, {})
    options = data.model_copy(
        update={"validation": 0.0, "test": None, "stream": False, "cache": str(cache), "skip_unreadable": True}
    )
    opening = Opening(options, 0, device, 0, 1, None)
    return open_files(folder, options, opening)


def _size(folder: Folder, split: str) -> int | None:
    return len(folder.splits[split]) if split in folder.splits else None


def _rows(files: ImageFiles, rows: list[int]) -> ImageFiles:
    return ImageFiles(files.root, [files.name(row) for row in rows], [int(files.labels[row]) for row in rows])


def _spread(size: int, most: int) -> list[int]:
    """Up to `most` evenly spaced rows of `size`."""
    return sorted({round(at * (size - 1) / max(1, most - 1)) for at in range(most)}) if size > most else [*range(size)]
