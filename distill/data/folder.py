"""Image folders: root/train/<class>/..., and root/val (or validation) and root/test likewise.

Classes are the folders of train, sorted by name (in Unicode's form NFC: both forms of a name are one class); files are
ordered by class, then by path; links are followed, hidden files ignored. With only one of val and test, as in
ImageNet's layout, it is the test split, and validation is held out of train. With `data.test` there may be no test
folder, or no folders of splits at all: root/<class>/...

Files that are no images or cannot be read are errors. With `data.skip_unreadable` they are found once, by decoding all
files, and recorded in the cache folder, so that batches are the same for any number of processes and on resume.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from distill.cores import share_of_cores
from distill.data.dataset import Dataset
from distill.data.image_files import REMEDY, Folder, ImageFiles, files_under, is_within
from distill.data.images import SUFFIXES
from distill.data.labels import class_name
from distill.data.opening import DataReader, Opening
from distill.data.packing import open_folder
from distill.data.unreadable import check_quickly, without_unreadable
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

LAYOUT = "an image folder is train/<class>/*.png and test/<class>/*.png (or val/<class>/*.png), in PNG, JPEG, WebP, ..."
LIKE_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})


class Options(Data):
    names: ClassVar[Sequence[str]] = ("folder", "imagenet")


@register("datasets", "folder", Options)
class FolderReader(DataReader):
    skips_unreadable = True

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        folder = scan(opening.root, skip=options.skip_unreadable, test=options.test is not None)
        return open_files(folder, options, opening)


def open_files(folder: Folder, options: Data, opening: Opening) -> Dataset:
    """The dataset of these files, packed and held in memory, or streamed."""
    if options.skip_unreadable:
        folder = without_unreadable(folder, opening.rules, opening.cache)
    if opening.streams(folder.num_images):
        if opening.process_index == 0 and not options.skip_unreadable:
            check_quickly(folder, opening.rules)
        dataset: Dataset = opening.stream(
            folder.splits, folder.class_names, content=folder.digest(), name=folder.origin.resolve().stem
        )
    else:
        packed = open_folder(folder, options.resolution, opening.rules, opening.cache)
        dataset = opening.resident(packed, fitted=True)
    files = folder.splits["train"]
    held_out = tuple(files.name(int(row)) for row in dataset.info.held_out)
    dataset.info = replace(dataset.info, held_out=held_out, left_out=folder.left_out)
    return dataset


EVALUATED: Mapping[str, Any] = {
    "stream": None, "test": None, "validation": 0, "labelled": None, "unlabelled": None, "class_weights": None,
    "sampler": None, "long_tail": None, "views": None,
}  # fmt: skip
"""Values of the keys of `data` that are about training, for data on which a student is evaluated alone."""


def open_test_images(spec: Data, device: torch.device) -> Dataset:
    """All images of `spec.root`/test/CLASS, or val/CLASS where there is no test, else of `spec.root`/CLASS, as the test
    split of a stream: for a student that is there already.

    Raises:
        InputError: it is no such folder, or a file in it is no image (unless `data.skip_unreadable`).
    """
    root = Path(spec.root)
    options = spec.model_copy(update={**EVALUATED, "stream": True})
    opening = Opening(options, 0, device, 0, share_of_cores(1) if spec.workers is None else spec.workers, None)
    try:
        found = _test_images(root, skip=spec.skip_unreadable)
    except OSError as error:
        raise InputError(f"{error.filename or root}: cannot be read ({error.strerror}).") from None
    if spec.skip_unreadable:
        found = without_unreadable(found, opening.rules, opening.cache)
    # What is streamed has training images; of these, nothing is read.
    return opening.stream(
        found.splits | {"train": found.splits["test"]},
        found.class_names,
        content=found.digest(),
        name=root.resolve().name,
    )


def _test_images(root: Path, *, skip: bool) -> Folder:
    layout = "images to evaluate on are DIR/<class>/*.png or DIR/test/<class>/*.png"
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; {layout}")
    folder = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), root)
    names = tuple(sorted({class_name(name) for name in _class_folders(folder)}))
    if folder == root and (split := [name for name in names if name.casefold() in LIKE_SPLITS]):
        raise InputError(f"{root / split[0]}: is named like a split, not like a class; {layout}")
    left_out: list[str] = []
    files = _list(root, folder, names, left_out)
    if left_out and not skip:
        raise InputError(f"{left_out[0]}; {REMEDY}")
    if not len(files):
        raise InputError(f"{folder}: no image of any class; {layout}")
    return Folder(root, names, {"test": files}, {"test": folder}, tuple(left_out))


def scan(root: Path, *, skip: bool = False, test: bool = False) -> Folder:
    """List an image folder.

    Args:
        skip: leave out files whose name is no image's or that cannot be reached.
        test: there may be no test folder, and no train folder either: the classes are then the folders of `root`.

    Raises:
        InputError: it is no image folder, or (without `skip`) contains such files.
    """
    try:
        return _scan(root, skip, test)
    except OSError as error:
        raise InputError(f"data.root: {error.filename or root}: cannot be read ({error.strerror}); {LAYOUT}") from None


def _scan(root: Path, skip: bool, test: bool) -> Folder:
    folders = _splits(root, test)
    class_names = tuple(sorted({class_name(name) for name in _class_folders(folders["train"])}))
    if len(class_names) < 2:
        raise InputError(
            f"data.root: {folders['train']} has {len(class_names)} class folder(s), at least two are needed; {LAYOUT}"
        )
    left_out: list[str] = []
    splits = {name: _list(root, folder, class_names, left_out) for name, folder in folders.items()}
    if left_out and not skip:
        raise InputError(f"data.root: {left_out[0]}; {REMEDY}")
    return Folder(root, class_names, splits, folders, tuple(left_out)).checked(skip=skip)


def _splits(root: Path, test: bool) -> dict[str, Path]:
    """The folder of each split; see `scan`."""
    if not root.is_dir():
        raise InputError(f"data.root: no such folder: {root}; {LAYOUT}")
    found = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    if test and not found and root.is_dir():
        if split := [name for name in _class_folders(root) if name.casefold() in LIKE_SPLITS]:
            raise InputError(
                f"data.root: {root / split[0]} is named like a split, not like a class; name the folders of the splits "
                "train, val and test, or the class otherwise"
            )
        return {"train": root}
    held_out = "; or, for images in DIR/<class>/*.png, set data.test=0.2 to hold out a fifth of them"
    if "train" not in found:
        raise InputError(f"data.root: {root} has no train folder; {LAYOUT}{'' if found or test else held_out}")
    validation = found.get("val", found.get("validation"))
    if "test" in found:
        folders = {"train": found["train"], "validation": validation, "test": found["test"]}
    elif test:
        folders = {"train": found["train"], "validation": validation}
    elif validation is not None:
        folders = {"train": found["train"], "test": validation}
    else:
        raise InputError(
            f"data.root: {root} has no test or val folder; {LAYOUT}; or set data.test=0.2 to hold out a fifth of train"
        )
    return {name: folder for name, folder in folders.items() if folder is not None}


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path, folder: Path, class_names: tuple[str, ...], left_out: list[str]) -> ImageFiles:
    """The images of a split; other files are appended to `left_out`, as path and reason."""
    names = _class_folders(folder)
    if unknown := [name for name in names if class_name(name) not in class_names]:
        raise InputError(
            f"data.root: {folder / unknown[0]} is a class that the train folder does not have; remove or rename it"
        )
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            left_out.append(f"{entry.path}: is in no class folder")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        files: list[str] = []
        for class_folder in [folder / own for own in names if class_name(own) == name]:
            found = list(files_under(class_folder))
            if class_folder.is_symlink() and is_within(folder, class_folder):
                found = [(str(class_folder), "links to a folder that contains it")]
            left_out += [f"{path}: {reason}" for path, reason in found if reason]
            files += [os.path.relpath(path, root) for path, reason in found if not reason]
        paths += sorted(files)
        labels += [label] * len(files)
    return ImageFiles(root, paths, labels)
