"""Hugging Face data sets with random access: hfds/NAME, of the Hub or of a folder of files.

The package `datasets` is needed. Image and label columns are those of the fitting types, or named. The splits are
'train', and 'test' or 'validation'; if the test split has no labels (ImageNet on the Hub), validation is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.data.cache import cache_folder, files_identity
from distill.data.dataset import Dataset
from distill.data.encoded import fetched
from distill.data.images import Source
from distill.data.labels import MISSING, check_labelled, encode
from distill.data.opening import DataReader, Opening
from distill.data.packed import sha256
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

PREFIX = "hfds/"
TEST_NAMES = ("test", "validation", "val", "valid")
_log = logging.getLogger("distill")


class Options(Data):
    names: ClassVar[Sequence[str]] = ("hfds/",)


@register("datasets", "hf_sets", Options)
class HuggingFaceReader(DataReader):
    has_columns = True

    @classmethod
    def at_hand(cls, options: Data) -> bool:
        return _is_local(options)

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        opening.must_stream()
        tables = load(options)
        if "train" not in tables:
            raise InputError(f"data.name: '{options.name}' has no split train; {describe(tables)}")
        columns = find_columns(options, tables["train"].features, describe(tables))
        splits, class_names = read_splits(options, tables, columns)
        return opening.stream(splits, class_names, content=_identity(options, columns, splits))


def _is_local(options: Data) -> bool:
    return Path(options.name.partition("/")[2]).is_dir()


class Table:
    """A split: labels and images by row."""

    def __init__(self, name: str, table: Any, column: str, labels: Tensor) -> None:
        self._name, self._column, self.labels = name, column, labels
        self._images = table.select_columns([column])

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, row: int) -> tuple[Source, str]:
        name = f"{self._name}, image {row}"
        value = self._images[row][self._column] or {}
        if not value.get("bytes") and not value.get("path"):
            raise InputError(f"{name}: there is no image in column '{self._column}'; leave the row out")
        return BytesIO(fetched(value, name)[0]), name

    def identity(self) -> str:
        """Names and sizes of the table's files, in a folder that the package names by a digest of its source."""
        files = [Path(file["filename"]) for file in self._images.cache_files]
        return "\n".join(f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in files)


def load(options: Data) -> Mapping[str, Any]:
    """The data set's splits as `datasets.Dataset`s; raises InputError if it, or the package, is missing."""
    datasets = _package(options.name)
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(
            options.name.removeprefix(PREFIX), cache_dir=str(_folder(options))
        )
    except Exception as error:  # of the package, the network, the files
        raise _cannot_be_opened(options, error) from None
    return loaded


def _package(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data.name: '{name}' needs the package datasets ({' '.join(str(error).split())}); run: pip install "
            "datasets"
        ) from None
    return datasets


def _folder(options: Data) -> Path:
    """Where the package keeps its files: data.root for what is downloaded; nothing goes beside local files."""
    return cache_folder(options.cache) / "huggingface" if _is_local(options) else Path(options.root)


def _cannot_be_opened(options: Data, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"data.name: '{options.name}' cannot be opened in {_folder(options)} ({reason}); check data.name and data.root"
    )


def describe(tables: Mapping[str, Any]) -> str:
    """What the data set has, for messages."""
    features = next(iter(tables.values())).features if tables else {}
    columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    return f"it has the columns {columns}, and the splits {', '.join(f'{k} ({len(v):,})' for k, v in tables.items())}"


def _kind(feature: Any) -> str:
    names = getattr(feature, "names", None)
    if names is not None:
        return f"ClassLabel of {len(names)}"
    dtype = getattr(feature, "dtype", None)
    return type(feature).__name__ if dtype in (None, "dict", "list") or _is_image(feature) else str(dtype)


def _is_image(feature: Any) -> bool:
    """Of the type Image, or bytes and path as in its files."""
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _is_scalar(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ == "Value" and (dtype.startswith(("int", "uint", "bool", "string", "large_string")))


def find_columns(options: Data, features: Mapping[str, Any], has: str) -> tuple[str, str]:
    """The columns of images and labels: as named, the only one of a fitting type, or the usual name among several."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    classes = [name for name, feature in features.items() if getattr(feature, "names", None) is not None]
    classes = classes or [name for name, feature in features.items() if _is_scalar(feature)]
    found = []
    for key, chosen, candidates, usual in (
        ("image_column", options.image_column, images, ("image", "img")),
        ("label_column", options.label_column, classes, ("label", "labels")),
    ):
        if chosen is not None:
            candidates = [chosen] if chosen in features else []
        elif len(candidates) > 1:
            candidates = [name for name in usual if name in candidates][:1] or candidates
        if len(candidates) != 1:
            wanted = f"no column '{chosen}'" if chosen else "several such columns" if candidates else "no such column"
            raise InputError(f"data.{key}: '{options.name}' has {wanted}; set data.{key} to one of its columns: {has}")
        found.append(candidates[0])
    image, label = found
    if not _is_image(features[image]) and getattr(features[image], "dtype", None) not in ("string", "binary"):
        raise InputError(f"data.image_column: column '{image}' of '{options.name}' has no images; {has}")
    if not _is_scalar(features[label]) and getattr(features[label], "names", None) is None:
        raise InputError(
            f"data.label_column: column '{label}' of '{options.name}' has not one class per image (a ClassLabel, a "
            f"string, a whole number or a bool); {has}"
        )
    return image, label


def columns_of(options: Data) -> tuple[str, str]:
    """The columns of images and labels of a set that is read sequentially, hfids/NAME."""
    datasets = _package(options.name)
    path = options.name.partition("/")[2]
    try:
        builder = datasets.load_dataset_builder(path, cache_dir=str(_folder(options)))
    except Exception as error:  # see load
        raise _cannot_be_opened(options, error) from None
    features = builder.info.features or {}
    if not features:
        return options.image_column or "image", options.label_column or "label"
    has = "it has the columns " + ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    image, label = find_columns(options, features, has)
    if str(getattr(features[label], "dtype", "")).endswith("string"):
        raise InputError(
            f"data.label_column: the labels in '{label}' of '{options.name}' are strings, whose classes are known only "
            f"after reading all: use hfds/{path}"
        )
    return image, label


def read_splits(
    options: Data, tables: Mapping[str, Any], columns: tuple[str, str]
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """'train', 'test' (unless `data.test` holds it out) and, if the source has both, 'validation'; class names."""
    from datasets import Image as ImageFeature

    (image, label), where = columns, f"data.name: '{options.name}'"
    used = {name: table for name, table in tables.items() if name == "train" or name in TEST_NAMES}
    names = getattr(used["train"].features[label], "names", None)
    values = {name: _column(table, label) for name, table in used.items()}
    if names is None:
        class_names, labels = encode(values, where)
    else:
        class_names = tuple(names)
        labels = {
            name: torch.tensor([MISSING if value is None else value for value in found])
            for name, found in values.items()
        }
    unlabelled = [name for name in used if not check_labelled(labels[name], f"{where}: split {name}")]
    if "train" in unlabelled:
        raise InputError(f"{where}: split train has no labels in column '{label}'; {describe(tables)}")
    splits: dict[str, Table] = {}
    for name in ("train", *TEST_NAMES):
        if name not in used or name in unlabelled:
            continue
        is_test = name == "test" or ("test" not in splits and options.test is None)
        target = name if name == "train" else "test" if is_test else "validation"
        if target not in splits:
            table = used[name].cast_column(image, ImageFeature(decode=False))
            splits[target] = Table(options.name, table, image, labels[name])
    note = f"split {' and '.join(unlabelled)} has no labels"
    if "test" not in splits and options.test is None:
        why = f"{note}; " if unlabelled else "no test or validation split; "
        raise InputError(f"{where}: {why}set data.test=0.2 to hold out a fifth of train; {describe(tables)}")
    if unlabelled:
        _log.info("data: %s of '%s'; it is not used", note, options.name)
    return splits, class_names


def _column(table: Any, name: str) -> list[Any]:
    """All values; a split may lack the column of labels."""
    return table.select_columns([name]).to_dict()[name] if name in table.column_names else [None] * len(table)


def _identity(options: Data, columns: tuple[str, str], splits: Mapping[str, Table]) -> str:
    """Changes with labels and images: for a local folder, with names, sizes and modification times of its files."""
    parts = [options.name, *columns, *(sha256(split.labels) for split in splits.values())]
    if _is_local(options):
        folder = Path(options.name.removeprefix(PREFIX))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        parts.append(files_identity(folder, files))
    else:
        parts += [split.identity() for split in splits.values()]
    return "\n".join(parts)
