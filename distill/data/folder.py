"""Image folders: root/train/<class>/..., and root/val (or validation) and root/test likewise.

Classes are the folders of train, sorted by name; files are ordered by class, then by path; links are followed, hidden
files ignored. With only one of val and test, as in ImageNet's layout, it is the test split, and validation is held out
of train.

Files that are no images or cannot be read are errors. With `data.skip_unreadable` they are found once, by decoding all
files, and recorded beside the data, so that batches are the same for any number of processes and on resume.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.dataset import Dataset
from distill.data.images import common_mode, decode, header_fault, to_square
from distill.data.locking import one_at_a_time
from distill.data.opening import DataReader, Opening
from distill.data.packed import Packed, open_packed, write_packed
from distill.errors import InputError
from distill.files.text import write_text
from distill.recipe import Data
from distill.registry import register

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
LAYOUT = "an image folder is train/<class>/*.png and test/<class>/*.png (or val/<class>/*.png), in PNG, JPEG, WebP, ..."

REMEDY = "remove it from the data or set data.skip_unreadable=true"
UNREADABLE = "unreadable.json"


class Options(Data):
    names: ClassVar[Sequence[str]] = ("folder", "imagenet")


@register("datasets", "folder", Options)
class FolderReader(DataReader):
    skips_unreadable = True

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        folder = scan(opening.root, skip=options.skip_unreadable)
        if options.skip_unreadable:
            folder = without_unreadable(folder)
        if opening.streams(folder.num_images):
            if opening.process_index == 0 and not options.skip_unreadable:
                check_quickly(folder)
            dataset: Dataset = opening.stream(
                folder.splits,
                folder.class_names,
                content=folder.digest(contents=False),
                mode=folder.mode,
                name=opening.root.resolve().name,
            )
        else:
            dataset = opening.resident(open_folder(folder, options.resolution))
        dataset.info = replace(dataset.info, left_out=folder.left_out)
        return dataset


class ImageFiles:
    """Labelled image files by row. Paths are one array, which forked workers share without copying."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(bytes(self._paths[row]))

    def without(self, rows: Sequence[int]) -> ImageFiles:
        """A copy without these rows."""
        kept = np.setdiff1d(np.arange(len(self)), rows)
        return ImageFiles(self.root, [os.fsdecode(path) for path in self._paths[kept]], self.labels[kept].tolist())

    def load(self, row: int, mode: str | None) -> Image.Image:
        """The decoded image; raises InputError naming the file if it cannot be decoded."""
        path = self.path(row)
        return decode(path, str(path), mode)


@dataclass(frozen=True)
class Folder:
    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, ImageFiles]
    folders: dict[str, Path]
    """The folder of each split."""
    left_out: tuple[str, ...] = ()
    """Files that are not used, with the reasons."""

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
        """SHA-256 (hex) over all paths; with `contents` also over sizes and modification times (one stat per file)."""
        state = hashlib.sha256()
        for split, files in self.splits.items():
            for row in range(len(files)):
                path = files.path(row)
                state.update(f"{split}\0{path.relative_to(self.root)}\0".encode(errors="surrogateescape"))
                if contents:
                    try:
                        status = path.stat()
                    except OSError as error:
                        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
                    state.update(f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return state.hexdigest()


def scan(root: Path, *, skip: bool = False) -> Folder:
    """List an image folder; `skip`: leave out files whose name is no image's or that cannot be reached.

    Raises:
        InputError: it is no image folder, or (without `skip`) contains such files.
    """
    try:
        return _scan(root, skip)
    except OSError as error:
        raise InputError(f"data.root: {error.filename or root}: cannot be read ({error.strerror}); {LAYOUT}") from None


def _scan(root: Path, skip: bool) -> Folder:
    found = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    if "train" not in found or len(found) == 1:
        raise InputError(
            f"data.root: {root} has no {'train' if 'train' not in found else 'test or val'} folder; {LAYOUT}"
        )
    validation = found.get("val", found.get("validation"))
    folders = {"train": found["train"], "validation": validation, "test": found.get("test", validation)}
    if "test" not in found:
        del folders["validation"]
    class_names = tuple(_class_folders(found["train"]))
    if len(class_names) < 2:
        raise InputError(
            f"data.root: {found['train']} has {len(class_names)} class folder(s), at least two are needed; {LAYOUT}"
        )
    left_out: list[str] = []
    present = {name: folder for name, folder in folders.items() if folder is not None}
    splits = {name: _list(root, folder, class_names, left_out) for name, folder in present.items()}
    if left_out and not skip:
        raise InputError(f"data.root: {left_out[0]}; {REMEDY}")
    return _checked(Folder(root, class_names, splits, present, tuple(left_out)), skip=skip)


def _checked(folder: Folder, *, skip: bool) -> Folder:
    """Raise InputError if a class has no image; with `skip` only in train."""
    for split, files in folder.splits.items():
        counts = torch.bincount(files.labels, minlength=len(folder.class_names)).tolist()
        if 0 in counts and (split == "train" or not skip or not len(files)):
            empty = folder.folders[split] / folder.class_names[counts.index(0)]
            raise InputError(f"data.root: {empty} holds no image; every class of train has some in every split")
    return folder


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path, folder: Path, class_names: tuple[str, ...], left_out: list[str]) -> ImageFiles:
    """The images of a split; other files are appended to `left_out`, as path and reason."""
    if unknown := sorted(set(_class_folders(folder)) - set(class_names)):
        raise InputError(
            f"data.root: {folder / unknown[0]} is a class that the train folder does not have; remove or rename it"
        )
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            left_out.append(f"{entry.path}: is in no class folder")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        class_folder = folder / name
        found = list(_under(class_folder)) if class_folder.is_dir() else []
        if class_folder.is_symlink() and _is_within(folder, class_folder):
            found = [(str(class_folder), "links to a folder that contains it")]
        left_out += [f"{path}: {reason}" for path, reason in found if reason]
        files = sorted(os.path.relpath(path, root) for path, reason in found if not reason)
        paths += files
        labels += [label] * len(files)
    return ImageFiles(root, paths, labels)


def _under(folder: str | Path) -> Iterator[tuple[str, str]]:
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
                if entry.is_symlink() and _is_within(folder, entry.path):
                    yield entry.path, "links to a folder that contains it"
                else:
                    yield from _under(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                yield entry.path, "is no image by its name"
            else:
                yield entry.path, "" if entry.is_file() else "is no file, or a broken link"
        except OSError as error:
            yield entry.path, f"cannot be read ({error.strerror})"


def _is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or under it, links followed."""
    inner, outer = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([inner, outer]) == outer


def check_quickly(folder: Folder) -> None:
    """Raise InputError for the first file that is empty, cannot be opened or has no image header.

    Reads headers only: 13,000 images a second on two cores, where 550 (JPEG, 500 x 375) can be decoded.
    """
    for split, row, reason in _faults(folder, lambda files, row: header_fault(files.path(row))):
        raise InputError(f"{folder.splits[split].path(row)}: {reason}; {REMEDY}")


def without_unreadable(folder: Folder) -> Folder:
    """The folder without images that cannot be decoded; all are decoded once, until files change."""
    source, record = folder.digest(contents=True), folder.root / UNREADABLE
    faults = _read_record(record, source)
    if faults is None:
        faults = [list(fault) for fault in _faults(folder, _decoding_fault)]
        with suppress(OSError):  # not writable: each process decodes for itself
            write_text(record, json.dumps({"source": source, "faults": faults, "sha256": _digest(source, faults)}))
    splits = {
        name: files.without([row for split, row, _ in faults if split == name]) for name, files in folder.splits.items()
    }
    left_out = (*folder.left_out, *(reason for *_, reason in faults))
    return _checked(replace(folder, splits=splits, left_out=left_out), skip=True)


def _read_record(path: Path, source: str) -> list[Any] | None:
    """The recorded faults of the files with digest `source`; None: no valid record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["faults"] if record["sha256"] == _digest(source, record["faults"]) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _digest(source: str, faults: list[Any]) -> str:
    return hashlib.sha256(json.dumps([source, faults]).encode()).hexdigest()


def _decoding_fault(files: ImageFiles, row: int) -> str | None:
    try:
        files.load(row, None)
    except InputError as error:
        return str(error)
    return None


def _faults(folder: Folder, look: Callable[[ImageFiles, int], str | None]) -> Iterator[tuple[str, int, str]]:
    """Split, row and reason, in order, of every file for which `look` returns a fault."""
    pool = ThreadPoolExecutor()  # PIL releases the GIL while decoding
    try:
        for split, files in folder.splits.items():

            def faults_in(rows: range, files: ImageFiles = files) -> list[tuple[int, str]]:
                return [(row, fault) for row in rows if (fault := look(files, row))]

            parts = (range(start, min(start + 256, len(files))) for start in range(0, len(files), 256))
            for found in pool.map(faults_in, parts):
                yield from ((split, row, fault) for row, fault in found)
    finally:
        pool.shutdown(cancel_futures=True)


def open_folder(folder: Folder, resolution: int) -> Packed:
    """The folder's images at one size (shorter side resized, centre cropped), from
    `<root>/packed-<resolution>.safetensors`, which is written if it is missing or the folder has changed.
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
    with ThreadPoolExecutor() as pool:  # PIL releases the GIL while decoding and resizing
        for split, files in folder.splits.items():
            images = torch.empty(len(files), 1 if mode == "L" else 3, resolution, resolution, dtype=torch.uint8)

            def fill(row: int, files: ImageFiles = files, images: Tensor = images) -> None:
                images[row] = to_square(files.load(row, mode), resolution, None)

            for _ in pool.map(fill, range(len(files))):
                pass
            tensors |= {f"{split}.images": images, f"{split}.labels": files.labels}
    write_packed(path, name=folder.root.name, class_names=folder.class_names, tensors=tensors, extra={"source": source})
