"""Opens the dataset of a recipe's data section with the reader of its name."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import registry
from distill.cores import share_of_cores
from distill.data.cache import cache_folder
from distill.data.dataset import Dataset, DatasetInfo, ResidentDataset, ResidentSplit
from distill.data.facts import range_of
from distill.data.given import GivenData
from distill.data.holdout import hold_out, keep_labels
from distill.data.images import ImageRules, is_grey, size_of
from distill.data.imbalance import long_tail
from distill.data.packed import PIXELS, Packed
from distill.data.stream import Reader, StreamDataset, StreamSplit
from distill.data.unlabelled import MixedDataset
from distill.data.unlabelled_files import with_images
from distill.errors import InputError
from distill.inputs import IMAGENET_MEAN, IMAGENET_STD
from distill.recipe import Data, reader_names, reader_of

LOOKED_AT = 256
"""Images of a stream whose size is looked at."""
RESIDENT_LIMIT = 4 << 30
"""Bytes of pixels above which data are streamed if data.stream is null."""


@dataclass(frozen=True)
class Opening:
    """Arguments of a reader, and constructors for the two kinds of dataset."""

    spec: Data
    seed: int
    """Of the validation split."""
    device: torch.device
    process_index: int
    workers: int
    """Decoding processes of a stream."""
    given: GivenData | None
    """The data of the name 'python'."""

    @property
    def root(self) -> Path:
        return Path(self.spec.root)

    @property
    def cache(self) -> Path:
        """The folder for packs."""
        return cache_folder(self.spec.cache)

    @property
    def rules(self) -> ImageRules:
        return ImageRules.of(self.spec)

    def streams(self, num_images: int) -> bool:
        """Whether to stream: as data.stream says, or by the number of images."""
        if self.spec.stream is None:
            return num_images * 3 * self.spec.resolution**2 > RESIDENT_LIMIT
        return self.spec.stream

    def must_stream(self) -> None:
        """Raise InputError if the recipe asks to hold the data in memory."""
        if self.spec.stream is False:
            raise InputError(f"data.stream: '{self.spec.name}' can only be streamed; set data.stream to null or true")

    def resident(self, packed: Packed, *, fitted: bool = False) -> ResidentDataset:
        """A dataset in memory, with its own mean and standard deviation per channel.

        `fitted`: its images have been resized and cropped by `data.fit`.
        """
        tensors, images = packed.tensors, packed.tensors["train.images"]
        labels = {
            split: tensors[f"{split}.labels"]
            for split in ("train", "validation", "test")
            if f"{split}.labels" in tensors
        }
        splits = {
            split: ResidentSplit(tensors[f"{source}.images"], tensors[f"{source}.labels"], rows)
            for split, (source, rows) in _rows(labels, self.spec, self.seed).items()
        }
        channels = tensors["train.images"].shape[1]
        if self.spec.channels not in (None, channels):
            raise InputError(
                f"data.channels: {packed.path} holds decoded images of {channels} channel(s); set data.channels to "
                f"null or {channels}"
            )
        if self.spec.fit != "crop" and not fitted:
            raise InputError(
                f"data.fit: the images of '{self.spec.name}' have one size already, so none is fitted; set it to crop"
            )
        mean, std = channel_statistics(splits["train"])
        held_out = self._held_out(splits["test"].rows)
        if not any(std):
            raise InputError(
                f"data: all training images of {packed.path} are the same colour, so there is nothing to learn from; "
                "look at them"
            )
        info = DatasetInfo(
            name=Path(self.spec.name).stem,
            class_names=packed.class_names,
            channels=channels,
            mean=mean,
            # A constant channel becomes 0.
            std=tuple(deviation or 1.0 for deviation in std),
            digest=_with_names(packed.digest, held_out),
            sizes={
                "train": splits["train"].size,
                "validation": splits["validation"].size if "validation" in splits else 0,
                "test": splits["test"].size,
            },
            class_images=_counted(splits["train"].own_labels, packed.class_names),
            pixels=packed.metadata.get(PIXELS) or ("" if fitted else range_of({(images.shape[3], images.shape[2])})),
            fitted=fitted,
            pack=packed.path if Path(packed.path).is_file() else None,
            held_out=held_out,
        )
        return ResidentDataset(info, self.spec, self.device, splits)

    def stream(
        self,
        readers: Mapping[str, Reader],
        class_names: tuple[str, ...],
        *,
        content: str,
        name: str | None = None,
    ) -> StreamDataset:
        """A dataset decoded on the fly, with ImageNet's mean and standard deviation.

        Args:
            readers: 'train', 'test' and perhaps 'validation'.
            content: a string that changes with the data, for their digest.
            name: of the data; None: as in the recipe.
        """
        labels = {split: reader.labels for split, reader in readers.items()}
        for split, numbers in labels.items():
            for label in map(int, torch.aminmax(numbers)):
                if not 0 <= label < len(class_names):
                    raise InputError(
                        f"data.name: label {label} in {split} of '{self.spec.name}' is out of range: classes are 0 to "
                        f"{len(class_names) - 1}"
                    )
        splits = {
            split: StreamSplit(readers[source], rows)
            for split, (source, rows) in _rows(labels, self.spec, self.seed).items()
        }
        rules = self.rules
        if rules.channels is None:
            train = readers["train"]
            grey = all(is_grey(*train.source(row), rules) for row in range(len(train.labels)))
            rules = rules._replace(channels=1 if grey else 3)
        sizes = {
            split: len(splits[split].labels) if split in splits else 0 for split in ("train", "validation", "test")
        }
        held_out = self._held_out(splits["test"].rows)
        info = self.describe(class_names, rules, sizes, content, name, pixels=self._pixels(readers["train"]))
        info = replace(
            info,
            digest=_with_names(info.digest, held_out),
            held_out=held_out,
            class_images=_counted(splits["train"].labels, class_names),
        )
        return StreamDataset(info, self.spec, self.device, splits, rules=rules, workers=self.workers)

    def _pixels(self, train: Reader) -> str:
        """The sizes of some images by their headers, for the process that says them."""
        if self.process_index != 0:
            return ""
        rows = torch.linspace(0, len(train.labels) - 1, LOOKED_AT).long().unique().tolist()
        seen = range_of({size_of(*train.source(row), self.rules) for row in rows})
        return seen if len(rows) == len(train.labels) else f"{seen} (of {len(rows)} looked at)"

    def _held_out(self, test: Tensor | None) -> tuple[str, ...]:
        """The rows of the test split, if `data.test` held it out."""
        return () if self.spec.test is None or test is None else tuple(map(str, test.tolist()))

    def describe(
        self,
        class_names: tuple[str, ...],
        rules: ImageRules,
        sizes: Mapping[str, int],
        content: str,
        name: str | None = None,
        pixels: str = "",
    ) -> DatasetInfo:
        """Metadata of streamed data, whose rules say how many channels they have; see `stream` and `DatasetInfo`."""
        assert rules.channels is not None
        grey = rules.channels == 1
        return DatasetInfo(
            name=name or self.spec.name,
            class_names=class_names,
            channels=rules.channels,
            # For greyscale the mean over ImageNet's channels.
            mean=(sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN,
            std=(sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD,
            digest=hashlib.sha256("\n".join([content, rules.identity, *class_names]).encode()).hexdigest(),
            sizes=dict(sizes),
            pixels=pixels,
            fitted=True,
        )


class DataReader:
    """Reads the data of a recipe's `data.name`. Override `read` for data in memory, else `open`.

    `options`: of the registered class, the recipe's data section with the reader's own keys.
    """

    skips_unreadable = False
    """Whether data.skip_unreadable may be true."""

    has_columns = False
    """Whether data.image_column and data.label_column may be set."""

    @classmethod
    def at_hand(cls, options: Any) -> bool:
        """Whether opening the data downloads nothing."""
        return True

    @classmethod
    def open(cls, options: Any, opening: Opening) -> Dataset:
        """The dataset. Several processes may open the same data at once.

        Raises:
            InputError: names the invalid key or file.
        """
        if options.stream:
            raise InputError(
                f"data.stream: '{options.name}' is small and held in memory; set data.stream to null or false"
            )
        return opening.resident(cls.read(options))

    @classmethod
    def read(cls, options: Any) -> Packed:
        """All images and labels."""
        raise NotImplementedError


def open_dataset(
    spec: Data,
    *,
    seed: int,
    device: torch.device,
    num_processes: int = 1,
    process_index: int = 0,
    given: GivenData | None = None,
    unlabelled: bool = True,
) -> Dataset:
    """The dataset of `spec` for one process, on its device; downloaded and packed first if needed.

    `seed`: of the validation split; `given`: the data of the name 'python'; `unlabelled`: whether the images of
    `data.unlabelled` are needed, as for training. Several processes may open the same data at
    once. Raises InputError naming the invalid key or file.
    """
    if (reader := reader_of(spec.name)) is None:
        names = reader_names()
        near = difflib.get_close_matches(spec.name, names, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise InputError(
            f"data.name: no dataset '{spec.name}'{hint}; known are {', '.join(names)}, where a final / is a prefix of "
            "timm's names, .safetensors the suffix of a packed file and .csv of a table; a plugin's dataset needs "
            "--plugin"
        )
    implementation: type[DataReader] = registry.find("datasets", reader).implementation
    if spec.skip_unreadable and not implementation.skips_unreadable and spec.unlabelled is None:
        raise InputError(f"data.skip_unreadable: only for image folders; set it to false for '{spec.name}'")
    for key in ("image_column", "label_column"):
        if getattr(spec, key) is not None and not implementation.has_columns:
            raise InputError(f"data.{key}: '{spec.name}' has no columns; set it to null")
    workers = spec.workers if spec.workers is not None else share_of_cores(num_processes)
    if spec.unlabelled is not None or spec.labelled is not None:
        workers = -(-workers // 2)  # for each of two parts
    opening = Opening(spec, seed, device, process_index, workers, given)
    dataset = implementation.open(spec, opening)
    if spec.labelled is not None:
        return MixedDataset(dataset, dataset.without_labels())
    return (
        dataset
        if spec.unlabelled is None or not unlabelled
        else with_images(dataset, opening.cache, opening.streams, workers)
    )


def _with_names(digest: str, names: Sequence[str]) -> str:
    """The digest of the data and of what `data.test` holds out."""
    return hashlib.sha256("\n".join([digest, *names]).encode()).hexdigest() if names else digest


def at_hand(spec: Data) -> bool:
    """Whether the dataset of `spec` can be opened without a download."""
    reader = reader_of(spec.name)
    return reader is not None and registry.find("datasets", reader).implementation.at_hand(spec)


def _rows(labels: dict[str, Tensor], spec: Data, seed: int) -> dict[str, tuple[str, Tensor | None]]:
    """Split of the run, or 'unlabelled' -> split of the source, and its rows (None: all)."""
    if spec.test is not None and "test" in labels:
        raise InputError(f"data.test: '{spec.name}' has a test split; set data.test to null")
    if spec.test is None and "test" not in labels:
        raise InputError(
            f"data.test: '{spec.name}' has no test split; set data.test=0.2 to hold out a fifth of its images"
        )
    train: Tensor | None = None
    rows: dict[str, tuple[str, Tensor | None]] = {"test": ("test", None)}
    if spec.test is not None:
        train, test = hold_out(labels["train"], spec.test, spec.test_seed, "test")
        rows["test"] = ("train", test)
    if spec.validation and spec.select_on == "validation":
        if "validation" in labels:
            rows["validation"] = ("validation", None)
        else:
            all_of_them = torch.arange(len(labels["train"])) if train is None else train
            remaining, held_out = hold_out(labels["train"][all_of_them], spec.validation, seed)
            train, rows["validation"] = all_of_them[remaining], ("train", all_of_them[held_out])
    left = torch.arange(len(labels["train"])) if train is None else train
    if spec.long_tail is not None:
        train = left = left[long_tail(labels["train"][left], spec.long_tail, seed, left)]
    if spec.labelled is not None:
        kept, others = keep_labels(labels["train"][left], spec.labelled, spec.labelled_seed, left)
        train, rows["unlabelled"] = left[kept], ("train", left[others])
    return {"train": ("train", train), **rows}


def _counted(labels: Tensor, class_names: Sequence[str]) -> tuple[int, ...]:
    """Images of each class."""
    return tuple(torch.bincount(labels, minlength=len(class_names)).tolist())


def channel_statistics(split: ResidentSplit, chunk: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation per channel of a split's images in [0, 1], exact: from integer counts
    of pixel values.
    """
    channels = split.images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    rows = torch.arange(len(split.labels)) if split.rows is None else split.rows
    for part in rows.split(chunk):
        images = split.images[part]
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].reshape(-1), minlength=256)
    values = torch.arange(256)
    total = int(counts[0].sum())
    means, deviations = [], []
    for count in counts:
        first, second = int((count * values).sum()), int((count * values**2).sum())
        means.append(first / total / 255)
        deviations.append((total * second - first * first) ** 0.5 / total / 255)
    return tuple(means), tuple(deviations)
