"""Datasets by timm's names: hfds/... (random access); helpers for hfids/, tfds/ and wds/ (sequential).

Users install the required packages (datasets, tensorflow-datasets, webdataset). The splits are 'train', and 'test' or
'validation'; if the test split has no labels (ImageNet on the Hugging Face hub), validation is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.data.dataset import Dataset
from distill.data.images import Source
from distill.data.opening import DataReader, Opening
from distill.data.shards import check_list
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets", "wds": "webdataset"}
TEST_NAMES = ("test", "validation", "val")


class Options(Data):
    names: ClassVar[Sequence[str]] = ("hfds/",)


@register("datasets", "timm_sets", Options)
class RandomAccessReader(DataReader):
    @classmethod
    def at_hand(cls, options: Data) -> bool:
        return False  # the hub is asked even for what is there

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        opening.must_stream()
        readers = open_random_access(options.name, opening.root)
        train = readers["train"]
        return opening.stream(readers, train.class_names, content=f"{options.name}\n{len(train)}")


def create(name: str, root: Path, split: str, **arguments: Any) -> Any:
    """timm's dataset; raises InputError if it, or a package that it needs, is missing.

    Of webdatasets only a local folder: webdataset takes what begins like `pipe:` for a command, and runs it.
    """
    from timm.data import create_dataset

    root = root.absolute()
    if name.startswith("wds/"):
        if not root.is_dir():
            raise InputError(
                f"data.root: {root} is no folder; '{name}' is read from a local one, with the shards and their "
                "_info.json"
            )
        check_list(root)
    try:
        return create_dataset(name, root=str(root), split=split, input_img_mode="", **arguments)
    except ImportError as error:
        raise _missing(name, error) from None
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        if "install" in str(error).lower():
            raise _missing(name, error) from None
        reason = " ".join(str(error).split())
        raise InputError(
            f"data.name: timm cannot open split '{split}' of '{name}' in {root} ({reason}); check data.name and "
            "data.root"
        ) from None


def _missing(name: str, error: Exception) -> InputError:
    package = PACKAGES[name.partition("/")[0]]
    return InputError(
        f"data.name: '{name}' needs the package {package} ({' '.join(str(error).split())}); run: pip install {package}"
    )


class RandomAccess:
    """A split with random access: all labels, and images by row."""

    def __init__(self, name: str, dataset: Any) -> None:
        self._name = name
        self._reader = dataset.reader
        self.labels: Tensor = torch.tensor(list(self._reader.dataset[self._reader.label_key]), dtype=torch.int64)
        names = dict(self._reader.class_to_idx)
        self.class_names: tuple[str, ...] = tuple(sorted(names, key=lambda key: names[key]))

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, row: int) -> tuple[Source, str]:
        # timm's dataset replaces an image that it cannot decode by the next one; its reader does not.
        file, *_ = self._reader[row]
        return file, f"{self._name}, image {row}"


def open_random_access(name: str, root: Path) -> dict[str, RandomAccess]:
    """'train', 'test' and, if the source has both, 'validation'."""
    splits = {"train": RandomAccess(name, create(name, root, "train"))}
    problems = []
    for split in TEST_NAMES:
        try:
            found = RandomAccess(name, create(name, root, split))
        except InputError as error:
            problems.append(str(error))
            continue
        if len(found) and int(found.labels.min()) >= 0:
            splits["validation" if "test" in splits else "test"] = found
        if "validation" in splits or split == "validation":
            break
    if "test" not in splits:
        raise InputError(
            problems[0] if problems else f"data.name: '{name}' has no test or validation split with labels"
        )
    return splits
