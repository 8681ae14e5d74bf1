"""Data given as Python objects: tensors, or map-style torch Datasets of (image, label)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from distill.data.images import ImageRules, Source, decode, read_square, stack
from distill.data.packed import Packed, problems_of, sha256
from distill.errors import InputError

SPLIT_NAMES = ("train", "validation", "test")
PROBES = 16
"""Items of each split that are read twice as a check, and whose pixels are part of a stream's digest."""
_ANY_SIZE = ImageRules(max_pixels=sys.maxsize)
FORMS = (
    "give data={'train': ..., 'test': ...} (perhaps with 'validation', and 'classes', their names) or (train, test), "
    "each a map-style torch Dataset of (PIL image or uint8 tensor, label), or a pair of tensors: images uint8 "
    "[N, C, H, W] and labels int64 [N]"
)


class DatasetReader:
    """A split of a torch Dataset: PIL images by row, and all labels."""

    def __init__(self, split: str, dataset: Any) -> None:
        self.split, self._dataset = split, dataset
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
            raise InputError(f"data: {split} is no map-style Dataset, or is empty; {FORMS}.")
        for row in self.probes():
            (one, label), (other, label_again) = self.item(row), self.item(row)
            one, other = (decode(image, self._name(row), _ANY_SIZE) for image in (one, other))
            if label != label_again or one.mode != other.mode or one.tobytes() != other.tobytes():
                raise InputError(
                    f"data: {split}[{row}] differs when it is read again. Leave random transforms out of the Dataset: "
                    "data.augment in the recipe has them."
                )

    def __len__(self) -> int:
        return len(self._dataset)

    def probes(self) -> list[int]:
        """Some rows, evenly spaced over the split."""
        return sorted(set(np.linspace(0, len(self) - 1, PROBES).astype(int).tolist()))

    def _name(self, row: int) -> str:
        return f"data: {self.split}[{row}]"

    def item(self, row: int) -> tuple[Image.Image, int]:
        """Image, perhaps not decoded yet, and label.

        Raises:
            InputError: it cannot be read, or has another type.
        """
        where = self._name(row)
        try:
            item = self._dataset[row]
        except Exception as error:  # the Dataset is the caller's code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{where} cannot be read as (image, label) ({reason}).") from error
        if isinstance(item, Mapping) or not isinstance(item, Sequence) or len(item) != 2:
            what = f"a mapping of {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
            raise InputError(
                f"{where} is {what}, not (image, label). Wrap the Dataset in one that returns these; for a set of the "
                "Hugging Face Hub there is data.name=hfds/NAME."
            )
        image, label = item
        try:
            number = int(label)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None or number != label or number < 0:
            raise InputError(f"{where} has the label {label!r}; labels are whole numbers from 0.")
        return _as_image(image, where), number

    def source(self, row: int) -> tuple[Source, str]:
        image, label = self.item(row)
        if label != self.labels[row]:
            raise InputError(
                f"{self._name(row)} has the label {label}, the Dataset's `targets` say {self.labels[row]}."
            )
        return image, self._name(row)

    def read(self, resolution: int, rules: ImageRules) -> tuple[Tensor, Tensor]:
        """All images, uint8 [N, C, resolution, resolution], and labels, int64 [N]."""
        labels = torch.empty(len(self), dtype=torch.int64)

        def squares() -> Iterator[Tensor]:
            for row in range(len(self)):
                image, labels[row] = self.item(row)
                yield read_square(image, self._name(row), resolution, rules)

        return stack(squares(), len(self)), labels

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N], from the attribute `targets` as in torchvision, or else by reading all items."""
        if getattr(self._dataset, "target_transform", None) is None:
            with suppress(TypeError, ValueError, RuntimeError):
                targets = torch.as_tensor(getattr(self._dataset, "targets", None), dtype=torch.int64)
                if targets.shape == (len(self),):
                    return targets
        return torch.tensor([self.item(row)[1] for row in range(len(self))])

    @property
    def class_names(self) -> tuple[str, ...]:
        """The attribute `classes`, as in torchvision; empty if there is none."""
        dataset = self._dataset
        while isinstance(dataset, torch_data.Subset):
            dataset = dataset.dataset
        names = getattr(dataset, "classes", ())
        return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()


def _as_image(image: Any, where: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] in (1, 3):
        pixels = image.cpu().numpy()
        return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise InputError(
        f"{where} holds {kind} instead of an image: PIL's, or uint8 [C, H, W] of 1 or 3 channels. Leave ToTensor, "
        "normalisation and augmentation out of the Dataset: the recipe has them."
    )


@dataclass(frozen=True)
class GivenData:
    """The given data, by split: tensors or Datasets."""

    tensors: Mapping[str, Tensor]
    """`train.images`, `train.labels` and so on, as in a packed file; empty if Datasets were given."""
    readers: Mapping[str, DatasetReader]
    class_names: tuple[str, ...]
    """Empty if not given; then classes are named by their numbers."""
    test_alone: bool = False
    """Whether the test split stands for that of training too, and may lack classes."""

    @classmethod
    def of(cls, data: Any, *, test_alone: bool = False) -> GivenData:
        """Check the argument `data=`; with `test_alone` it needs no training split.

        Raises:
            InputError: it has none of the supported forms.
        """
        if isinstance(data, Sequence) and len(data) == 2 and not any(isinstance(part, Tensor) for part in data):
            data = {"train": data[0], "test": data[1]}
        if not isinstance(data, Mapping):
            raise InputError(f"data: {type(data).__name__}; {FORMS}.")
        splits = {"validation" if name == "val" else name: split for name, split in data.items() if name != "classes"}
        if unknown := [name for name in splits if name not in SPLIT_NAMES]:
            raise InputError(f"data: no split {unknown[0]!r}; {FORMS}.")
        if test_alone := test_alone and "train" not in splits and "test" in splits:
            splits["train"] = splits["test"]
        if missing := [name for name in ("train", "test") if splits.get(name) is None]:
            raise InputError(f"data: the {missing[0]} split is missing; {FORMS}.")
        pairs = {name: split for name, split in splits.items() if isinstance(split, Sequence)}
        names = tuple(str(name) for name in data.get("classes") or ())
        if pairs and len(pairs) < len(splits):
            raise InputError(f"data: tensors for {', '.join(pairs)} only; give all splits in the same form; {FORMS}.")
        if not pairs:
            readers = {name: DatasetReader(name, split) for name, split in splits.items()}
            return cls({}, readers, names or readers["train"].class_names, test_alone)
        tensors: dict[str, Tensor] = {}
        for name, pair in pairs.items():
            if len(pair) != 2 or not all(isinstance(tensor, Tensor) for tensor in pair):
                raise InputError(f"data: {name} is no pair of tensors; {FORMS}.")
            images, labels = (tensor.detach().cpu() for tensor in pair)
            labels = labels if labels.is_floating_point() else labels.long()
            tensors |= {f"{name}.images": images, f"{name}.labels": labels}
        return cls(tensors, {}, names, test_alone)

    @property
    def num_images(self) -> int:
        parts = self.readers.values() or [value for key, value in self.tensors.items() if key.endswith("labels")]
        return sum(len(part) for part in parts)

    def pack(self, resolution: int, rules: ImageRules) -> Packed:
        """All data in memory, checked like a packed file; images from Datasets are resized to `resolution`, like those
        of an image folder.

        Raises:
            InputError: an image, a label or a split is invalid.
        """
        tensors = dict(self.tensors or self._read(resolution, rules))
        labels = [tensors[key] for key in tensors if key.endswith(".labels")]
        names = self.class_names or _numbers(labels)
        if len(set(names)) != len(names) or len(names) < 2:
            raise InputError(f"data: {len(names)} class(es); at least two different ones are needed.")
        for problem, _ in problems_of(tensors, {}, names, None, is_whole=True, every_class=not self.test_alone):
            raise InputError(f"data: {problem}; {FORMS}.")
        return Packed("data", names, tensors, {f"sha256/{key}": sha256(tensor) for key, tensor in tensors.items()})

    def _read(self, resolution: int, rules: ImageRules) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.readers, key=SPLIT_NAMES.index):
            squares, labels = self.readers[name].read(resolution, rules)
            rules = rules._replace(channels=squares.shape[1])  # those of train, the first split, for all
            yield f"{name}.images", squares
            yield f"{name}.labels", labels

    def digest_of_stream(self, rules: ImageRules) -> str:
        """SHA-256 (hex) over all labels and some of the images, since reading all of them takes long."""
        state = hashlib.sha256()
        for name, reader in self.readers.items():
            state.update(f"{name}\0{sha256(reader.labels)}\0".encode())
            for row in reader.probes():
                image = decode(*reader.source(row), rules)
                state.update(f"{image.mode}\0{image.size}\0".encode() + image.tobytes())
        return state.hexdigest()

    def names_of_stream(self) -> tuple[str, ...]:
        """Class names, by default their numbers."""
        return self.class_names or _numbers([reader.labels for reader in self.readers.values()])


def _numbers(labels: Sequence[Tensor]) -> tuple[str, ...]:
    """Default class names; placeholders if the labels are invalid."""
    if not all(len(part) and not part.is_floating_point() for part in labels):
        return ("0", "1")
    return tuple(map(str, range(1 + max(int(part.max()) for part in labels))))
