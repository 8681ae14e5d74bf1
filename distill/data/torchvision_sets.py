"""Small torchvision classification datasets, downloaded and packed once, and other packed files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.locking import one_at_a_time
from distill.data.opening import DataReader
from distill.data.packed import Expected, Packed, open_packed, write_packed
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register


class Options(Data):
    names: ClassVar[Sequence[str]] = (
        "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn", "stl10", ".safetensors",
    )  # fmt: skip


class Known(NamedTuple):
    """A torchvision class by name, the arguments of its two splits, and what they contain."""

    dataset: str
    train: dict[str, Any]
    test: dict[str, Any]
    expected: Expected


_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})

KNOWN = {
    "cifar10": Known("CIFAR10", *_FLAG, Expected(10, 50_000, 10_000, (3, 32, 32))),
    "cifar100": Known("CIFAR100", *_FLAG, Expected(100, 50_000, 10_000, (3, 32, 32))),
    "mnist": Known("MNIST", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "fashion_mnist": Known("FashionMNIST", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "kmnist": Known("KMNIST", *_FLAG, Expected(10, 60_000, 10_000, (1, 28, 28))),
    "svhn": Known("SVHN", *_SPLIT, Expected(10, 73_257, 26_032, (3, 32, 32))),
    "stl10": Known("STL10", *_SPLIT, Expected(10, 5_000, 8_000, (3, 96, 96))),
}


@register("datasets", "torchvision_sets", Options)
class PackedFile(DataReader):
    @classmethod
    def read(cls, options: Data) -> Packed:
        root = Path(options.root)
        if options.name in KNOWN:
            return open_known(options.name, root)
        in_root = root / options.name
        path = in_root if in_root.exists() or not Path(options.name).exists() else Path(options.name)
        known = KNOWN.get(path.stem)
        return open_packed(path, known.expected if known is not None else None)


def open_known(name: str, root: Path) -> Packed:
    """The packed file `<root>/<name>.safetensors`; if missing, it is made from torchvision's files or download."""
    path = root / f"{name}.safetensors"
    if not path.exists():
        with one_at_a_time(path):
            if not path.exists():
                _pack(name, root, path)
    return open_packed(path, KNOWN[name].expected)


def _pack(name: str, root: Path, path: Path) -> None:
    from torchvision import datasets

    known = KNOWN[name]
    make: Callable[..., Any] = getattr(datasets, known.dataset)
    try:
        train, test = (make(str(root), download=True, **arguments) for arguments in (known.train, known.test))
    except (
        OSError,
        RuntimeError,
        HTTPException,
    ) as error:  # without network, or for damaged files
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no such file, and torchvision cannot download '{name}' ({reason}); put {path.name} (packed) or "
            f"torchvision's own files of {known.dataset} into {root}, or set data.root to where they are"
        ) from None
    classes = getattr(train, "classes", [str(label) for label in range(known.expected.classes)])
    tensors = {}
    for split, dataset in (("train", train), ("test", test)):
        tensors[f"{split}.images"] = _nchw(dataset.data)
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        tensors[f"{split}.labels"] = torch.as_tensor(labels).to(torch.int64)
    write_packed(path, name=name, class_names=tuple(classes), tensors=tensors)


def _nchw(data: np.ndarray | Tensor) -> Tensor:
    """torchvision holds images as [N, H, W], [N, H, W, 3] or [N, 3, H, W]."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
