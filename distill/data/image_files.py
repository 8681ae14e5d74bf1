"""Labelled image files on disk, by split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill.data.images import SUFFIXES, Source
from distill.errors import InputError

REMEDY = "remove it from the data or set data.skip_unreadable=true"


class ImageFiles:
    """Labelled image files by row. Paths are one array, which forked workers share without copying."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """The path as listed, by default relative to the root."""
        return os.fsdecode(bytes(self._paths[row]))

    def path(self, row: int) -> Path:
        return self.root / self.name(row)

    def without(self, rows: Sequence[int]) -> ImageFiles:
        """A copy without these rows."""
        kept = np.setdiff1d(np.arange(len(self)), rows)
        return ImageFiles(self.root, [os.fsdecode(path) for path in self._paths[kept]], self.labels[kept].tolist())

    def source(self, row: int) -> tuple[Source, str]:
        path = self.path(row)
        return path, str(path)


@dataclass(frozen=True)
class Folder:
    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, ImageFiles]
    folders: dict[str, Path]
    """The folder of each split that has one."""
    left_out: tuple[str, ...] = ()
    """Files that are not used, with the reasons."""
    table: Path | None = None
    """The .csv file that lists the images; None: they are what is in `folders`."""

    @property
    def origin(self) -> Path:
        """What people name as their data."""
        return self.table or self.root

    @property
    def num_images(self) -> int:
        return sum(len(files) for files in self.splits.values())

    def digest(self) -> str:
        """SHA-256 (hex) over all paths, labels, sizes and modification times (one stat per file)."""
        state = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for split, files in self.splits.items():
            labels = files.labels.tolist()
            for row in range(len(files)):
                path = files.path(row)
                state.update(f"{split}\0{files.name(row)}\0".encode(errors="surrogateescape"))
                try:
                    status = path.stat()
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
                state.update(f"{labels[row]}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return state.hexdigest()

    def checked(self, *, skip: bool) -> Folder:
        """Itself; raises InputError if a class has no image; with `skip` only in train."""
        for split, files in self.splits.items():
            counts = torch.bincount(files.labels, minlength=len(self.class_names)).tolist()
            if 0 in counts and (split == "train" or not skip or not len(files)):
                empty = self.folders.get(split, self.root / split) / self.class_names[counts.index(0)]
                raise InputError(f"data.root: {empty} holds no image; every class of train has some in every split")
        return self


def files_under(folder: str | Path) -> Iterator[tuple[str, str]]:
    """All non-hidden files under a folder: path, and why it cannot be used (empty: it can)."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield str(folder), f"cannot be read ({error.strerror})"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                if entry.is_symlink() and is_within(folder, entry.path):
                    yield entry.path, "links to a folder that contains it"
                else:
                    yield from files_under(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                yield entry.path, "is no image by its name"
            else:
                yield entry.path, "" if entry.is_file() else "is no file, or a broken link"
        except OSError as error:
            yield entry.path, f"cannot be read ({error.strerror})"


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or under it, links followed."""
    inner, outer = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([inner, outer]) == outer
