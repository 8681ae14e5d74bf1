"""`data.unlabelled`: a folder of images at any depth, or a packed file of images, as training images without labels.

A packed file is a .safetensors with the tensor `images`, uint8 [N, C, H, W], or that of a packed dataset, whose
`train.images` are taken. Images of a folder are fitted to those of the dataset, and packed in the cache folder or
streamed, by their own number, as those of a labelled image folder are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.data.cache import cached_file
from distill.data.dataset import Dataset, ResidentDataset, ResidentSplit
from distill.data.image_files import REMEDY, Folder, ImageFiles, files_under
from distill.data.images import ImageRules, is_grey
from distill.data.packed import describe, sha256, wrong_order
from distill.data.packing import Progress, made_once, read_images
from distill.data.stream import StreamDataset, StreamSplit, WithoutLabels
from distill.data.unlabelled import MixedDataset
from distill.data.unreadable import check_quickly, without_unreadable
from distill.errors import InputError
from distill.files.checksum import CHECKSUM, has_right_checksum
from distill.files.safetensors_file import read_safetensors
from distill.files.tensors import write_tensors

KEYS = ("images", "train.images")
"""The tensor of a packed file that is taken: the first that there is."""
ADVICE = "data.unlabelled is a folder of images, or a .safetensors file with a uint8 tensor 'images' [N, C, H, W]."


def with_images(dataset: Dataset, cache: Path, streams: Callable[[int], bool], workers: int) -> MixedDataset:
    """The dataset with the images of its `data.unlabelled`.

    Args:
        cache: the folder for packs.
        streams: whether so many images are streamed.
        workers: decoding processes of a stream.

    Raises:
        InputError: there are none, they cannot be used, or they do not fit the dataset's.
    """
    spec, shape = dataset.spec, dataset.image_shape
    path = Path(spec.unlabelled or "")
    if dataset.in_order:
        raise InputError(
            f"data.unlabelled: '{spec.name}' is read in its reader's order, without random access; set it to null"
        )
    if path.suffix == ".safetensors" and not path.is_dir():
        images, digest = _packed_by_user(path)
        return MixedDataset(dataset, _resident(dataset, images, path), digest)
    rules = ImageRules.of(spec)
    folder = _scan(path, skip=spec.skip_unreadable)
    if spec.skip_unreadable:
        folder = without_unreadable(folder, rules, cache)
    if not folder.num_images:
        raise InputError(f"data.unlabelled: {path} holds no image; {ADVICE}")
    if not streams(folder.num_images):
        if shape[1] != shape[2]:
            raise InputError(f"data.unlabelled: {path}: the data's images are {shape[2]} x {shape[1]}, not square")
        images = _packed(folder, shape[1], rules, cache)
        unlabelled: Dataset = _resident(dataset, images, path)
        digest = sha256(images)
    else:
        if not spec.skip_unreadable:
            check_quickly(folder, rules)
        files = folder.splits["train"]
        if rules.channels is None:
            grey = all(is_grey(*files.source(row), rules) for row in range(len(files)))
            rules = rules._replace(channels=1 if grey else 3)
        assert rules.channels is not None
        _check_shape((rules.channels, spec.resolution, spec.resolution), shape, path)
        info = dataset.info.of_training(len(files))
        split = StreamSplit(WithoutLabels(files), None)
        unlabelled = StreamDataset(info, spec, dataset.device, {"train": split}, rules=rules, workers=workers)
        digest = hashlib.sha256(f"{folder.digest()}\n{rules.identity}".encode()).hexdigest()
    unlabelled.info = replace(unlabelled.info, left_out=folder.left_out)
    return MixedDataset(dataset, unlabelled, digest)


def _resident(dataset: Dataset, images: Tensor, path: Path) -> ResidentDataset:
    _check_shape(images.shape[1:], dataset.image_shape, path)
    split = ResidentSplit(images, torch.full((len(images),), -1), None)
    return ResidentDataset(dataset.info.of_training(len(images)), dataset.spec, dataset.device, {"train": split})


def _check_shape(found: tuple[int, ...], needed: tuple[int, int, int], path: Path) -> None:
    """Raise InputError if images [C, H, W] are not as the dataset's."""
    if found[0] != needed[0]:
        how = {1: "greyscale", 3: "colour"}.get(needed[0])
        folder = path.suffix != ".safetensors" or path.is_dir()
        remedy = f"set data.channels={needed[0]} to decode them in {how}" if how and folder else "convert them"
        raise InputError(
            f"data.unlabelled: {path}: images of {found[0]} channel(s), the data have {needed[0]}; {remedy}"
        )
    if tuple(found[1:]) != needed[1:]:
        raise InputError(
            f"data.unlabelled: {path}: images of {found[2]} x {found[1]} pixels, the data's are {needed[2]} x "
            f"{needed[1]}; resize them, or give a folder of images, which is resized, with data.stream=false"
        )


def _scan(root: Path, *, skip: bool) -> Folder:
    """All images under a folder, in the order of their paths.

    Raises:
        InputError: it is no folder, or (without `skip`) has files that are no images.
    """
    if not root.is_dir():
        raise InputError(f"data.unlabelled: {root} is {'no folder' if root.exists() else 'not there'}. {ADVICE}")
    found = list(files_under(root))
    left_out = tuple(f"{path}: {reason}" for path, reason in found if reason)
    if left_out and not skip:
        raise InputError(f"data.unlabelled: {left_out[0]}; {REMEDY}")
    paths = sorted(os.path.relpath(path, root) for path, reason in found if not reason)
    return Folder(root, (), {"train": ImageFiles(root, paths, [0] * len(paths))}, {}, left_out)


def _packed(folder: Folder, side: int, rules: ImageRules, cache: Path) -> Tensor:
    """uint8 [N, C, side, side], from a file in the cache folder, which is written if it is missing or outdated."""
    path = cached_file(cache, folder.root, {"unlabelled": side, "rules": rules.identity}, ".safetensors")
    source = folder.digest()

    def current() -> Tensor | None:
        try:
            tensors, metadata = read_safetensors(path, "pt", advice="")
        except InputError:
            return None
        return tensors["images"] if metadata.get("source") == source and has_right_checksum(path, metadata) else None

    def make() -> Tensor:
        progress = Progress(f"packing the images of {folder.root}", folder.num_images)
        images = read_images(folder.splits["train"], side, rules, progress, set())
        write_tensors(path, {"images": images}, {"source": source, CHECKSUM: ""})
        return images

    return made_once(path, current, make)


def _packed_by_user(path: Path) -> tuple[Tensor, str]:
    """Images and digest of a packed file."""
    tensors, metadata = read_safetensors(path, "pt", links=True, advice=ADVICE)
    key = next((key for key in KEYS if key in tensors), None)
    if key is None:
        raise InputError(f"{path}: holds the tensors {', '.join(sorted(tensors)) or '(none)'}. {ADVICE}")
    images, digest = tensors[key], sha256(tensors[key])
    if (order := wrong_order(images, len(images) if images.ndim else 0)) is not None:
        raise InputError(
            f"{path}: {key} is {describe(images)} in the order {order.axes}; pack images{order.remedy}.contiguous(), "
            "[N, C, H, W]"
        )
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
        raise InputError(
            f"{path}: {key} is {describe(images)}, not uint8 [N, C, H, W] of at least one image; pack it again"
        )
    damaged = not has_right_checksum(path, metadata) if CHECKSUM in metadata else False
    if damaged or metadata.get(f"sha256/{key}", digest) != digest:
        raise InputError(
            f"{path}: its bytes are not those that were written (SHA-256 differs), so it is damaged or altered; get it "
            "again"
        )
    return images, digest
