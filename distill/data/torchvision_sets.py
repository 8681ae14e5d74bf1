"""Small torchvision classification datasets, downloaded and packed once, and other packed files."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.cache import REMEDY, cache_folder, cached_file, files_identity
from distill.data.locking import one_at_a_time
from distill.data.opening import DataReader
from distill.data.packed import Expected, Packed, open_packed, write_packed
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

_log = logging.getLogger("distill")


class Options(Data):
    names: ClassVar[Sequence[str]] = (
        "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn", "stl10", ".safetensors",
    )  # fmt: skip


class Known(NamedTuple):
    """A torchvision class by name, its files below the root, the arguments of its two splits, and what they contain."""

    dataset: str
    files: str
    train: dict[str, Any]
    test: dict[str, Any]
    expected: Expected


_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})

KNOWN = {
    "cifar10": Known("CIFAR10", "cifar-10-batches-py/*", *_FLAG, Expected(10, 50_000, 10_000, (3, 32, 32))),
    "cifar100": Known("CIFAR100", "cifar-100-python/*", *_FLAG, Expected(100, 50_000, 10_000, (3, 32, 32))),
    "mnist": Known("MNIST", "MNIST/raw/*", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "fashion_mnist": Known("FashionMNIST", "FashionMNIST/raw/*", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "kmnist": Known("KMNIST", "KMNIST/raw/*", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "svhn": Known("SVHN", "*_32x32.mat", *_SPLIT, Expected(10, 73_257, 26_032, (3, 32, 32))),
    "stl10": Known("STL10", "stl10_binary/*", *_SPLIT, Expected(10, 5_000, 8_000, (3, 96, 96))),
}


@register("datasets", "torchvision_sets", Options)
class PackedFile(DataReader):
    @classmethod
    def at_hand(cls, options: Data) -> bool:
        name, root = options.name, Path(options.root)
        return name not in KNOWN or bool(
            _existing(name, root, cache_folder(options.cache)) or _source(name, root) is not None
        )

    @classmethod
    def read(cls, options: Data) -> Packed:
        root = Path(options.root)
        if options.name in KNOWN:
            return open_known(options.name, root, cache_folder(options.cache))
        in_root = root / options.name
        path = in_root if in_root.exists() or not Path(options.name).exists() else Path(options.name)
        known = KNOWN.get(path.stem)
        return open_packed(path, known.expected if known is not None else None, needs_test=options.test is None)


def open_known(name: str, root: Path, cache: Path) -> Packed:
    """The packed file `<root>/<name>.safetensors`; if missing, one in the cache folder, made from torchvision's files,
    which are downloaded to `root` if they are missing too.
    """
    if (packed := _existing(name, root, cache)) is None:
        path = cached_file(cache, root, name, ".safetensors")
        with one_at_a_time(path, REMEDY):
            if _existing(name, root, cache) is None:
                _pack(name, root, path)
        packed = open_packed(path, KNOWN[name].expected)
    return packed


def _existing(name: str, root: Path, cache: Path) -> Packed | None:
    """None: there is no packed file, the one in the cache is damaged, or torchvision's files have changed since."""
    if (own := root / f"{name}.safetensors").exists():
        return open_packed(own, KNOWN[name].expected)
    path = cached_file(cache, root, name, ".safetensors")
    if not path.exists():
        return None
    try:
        packed = open_packed(path, KNOWN[name].expected)
    except InputError:
        return None
    # Without torchvision's files the pack alone is enough.
    return packed if _source(name, root) in (None, packed.metadata.get("source")) else None


def _source(name: str, root: Path) -> str | None:
    """SHA-256 (hex) over names, sizes and modification times of torchvision's files; None: there are none."""
    files = sorted(path for path in root.glob(KNOWN[name].files) if path.is_file())
    return files_identity(root, files) if files else None


def _pack(name: str, root: Path, path: Path) -> None:
    from torchvision import datasets

    known = KNOWN[name]
    _log.info("data: packing %s into %s", name, path)
    make: Callable[..., Any] = getattr(datasets, known.dataset)
    try:
        train, test = (make(str(root), download=True, **arguments) for arguments in (known.train, known.test))
    except (OSError, RuntimeError, HTTPException) as error:  # without network, or for damaged files
        reason = " ".join(str(error).split())
        unwritable = isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EROFS,
            errno.ENOTDIR,
            errno.ENOSPC,
        )
        raise InputError(
            f"{root / name}.safetensors: no such file, and torchvision cannot download '{name}' ({reason}); put "
            f"{name}.safetensors (packed) or torchvision's own files of {known.dataset} into {root}, or set data.root "
            + ("to a writable folder" if unwritable else "to where they are")
        ) from None
    classes = getattr(train, "classes", [str(label) for label in range(known.expected.classes)])
    tensors = {}
    for split, dataset in (("train", train), ("test", test)):
        tensors[f"{split}.images"] = _nchw(dataset.data)
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        tensors[f"{split}.labels"] = torch.as_tensor(labels).to(torch.int64)
    source = {"source": _source(name, root) or ""}
    try:
        write_packed(path, name=name, class_names=tuple(classes), tensors=tensors, extra=source)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {REMEDY}") from None


def _nchw(data: np.ndarray | Tensor) -> Tensor:
    """torchvision holds images as [N, H, W], [N, H, W, 3] or [N, 3, H, W]."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
