"""Streamed data: worker processes decode images on demand; augmentation runs on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from distill.data.augment import to_float
from distill.data.batches import BatchPlan
from distill.data.dataset import Dataset, DatasetInfo, RawBatch, Split
from distill.data.fitting import Box, frame
from distill.data.geometry import RESIZED_CROP_DRAWS, crop_boxes
from distill.data.images import ImageRules, Source, decode, to_square
from distill.data.loading import items, worker_loader
from distill.data.randomness import hashes, keys, view_suffix
from distill.errors import InputError
from distill.recipe import Data
from distill.recipe.augment import RandomResizedCrop


class Reader(Protocol):
    """Labelled images by row."""

    @property
    def labels(self) -> Tensor: ...

    def source(self, row: int) -> tuple[Source, str]:
        """The image, not decoded, and its name for messages."""
        ...


class WithoutLabels(NamedTuple):
    """The images of a reader with labels -1."""

    reader: Reader

    @property
    def labels(self) -> Tensor:
        return torch.full_like(self.reader.labels, -1)

    def source(self, row: int) -> tuple[Source, str]:
        return self.reader.source(row)


class StreamSplit(NamedTuple):
    """A reader, and its rows that make up the split (None: all)."""

    reader: Reader
    rows: Tensor | None

    @property
    def labels(self) -> Tensor:
        return self.reader.labels if self.rows is None else self.reader.labels[self.rows]

    @property
    def size(self) -> int:
        return len(self.reader.labels if self.rows is None else self.rows)


class Draw(NamedTuple):
    """Arguments of a training image's random crops, besides its number."""

    seed: int
    epoch: int
    views: int = 1
    """Number of crops."""


Request = tuple[list[int], Draw | None]
"""The images of a batch by their positions in the split, in training by `RawBatch.draws`, and the draw of their crops
(None: centre crops).
"""


@lru_cache(maxsize=128)
def _crop_keys(seed: int, epoch: int, view: int) -> Tensor:
    return keys(seed, epoch, [name + view_suffix(view) for name in RESIZED_CROP_DRAWS])


def has_crops(spec: Data) -> bool:
    """Whether training images are random crops."""
    return spec.views is not None or spec.augment.random_resized_crop is not None


def squares(image: Image.Image, index: int, draw: Draw | None, spec: Data, rules: ImageRules) -> list[Tensor]:
    """Squares of an image, uint8 [C, size, size] each: its random crops, one a view; without any, or without a draw,
    the whole image.
    """
    if draw is None or not has_crops(spec):
        return [to_square(image, spec.resolution, None, rules)]
    crops: Sequence[tuple[RandomResizedCrop, int]]
    if (crop := spec.augment.random_resized_crop) is not None:
        crops = [(crop, spec.resolution)] * draw.views
    else:
        crops = [(group, group.size) for group in spec.views or () for _ in range(group.count)]
    return [
        to_square(image, size, crop_box(image, index, draw, crop, rules.fit, view), rules)
        for view, (crop, size) in enumerate(crops[: draw.views])
    ]


def crop_box(
    image: Image.Image, index: int, draw: Draw, crop: RandomResizedCrop, fit: str = "crop", view: int = 0
) -> Box:
    """The random crop of a sample: the draws of data in memory, applied to the image's own size (its `frame`)."""
    hashed = hashes(_crop_keys(draw.seed, draw.epoch, view), torch.tensor([index]))
    top, left, height, width = (int(side) for side in crop_boxes(hashed, *frame(image, fit), crop.scale, crop.ratio))
    return top, left, height, width


class _Decoder(torch_data.Dataset):
    """Runs in the workers: a request -> uint8 [B, C, R, R], labels, its numbers, and the crops of further views.

    Returns errors of broken images instead of raising them, since the loader would add the worker's stack trace.
    """

    def __init__(self, split: StreamSplit, spec: Data, rules: ImageRules) -> None:
        self.split, self.spec, self.rules = split, spec, rules

    def __getitem__(self, request: Request) -> tuple[Tensor, ...] | InputError:
        numbers, draw = request
        drawn = torch.tensor(numbers)
        positions = drawn % self.split.size
        rows = positions if self.split.rows is None else self.split.rows[positions]
        images = []
        try:
            for number, row in zip(numbers, rows.tolist(), strict=True):
                image = decode(*self.split.reader.source(row), self.rules)
                images.append(squares(image, number, draw, self.spec, self.rules))
        except InputError as error:
            return error
        first, *others = map(torch.stack, zip(*images, strict=True))
        return first, self.split.reader.labels[rows], drawn, *others


def raw_batch(item: Sequence[Tensor], device: torch.device) -> RawBatch:
    """What workers give, images, labels, draws and further crops, on the device."""
    images, labels, draws, *crops = (tensor.to(device, non_blocking=True) for tensor in item)
    return RawBatch(images, labels, draws, tuple(crops))


class _Requests(torch_data.Sampler):
    """The requests of the current epoch, replaced in place, since the loader's workers persist over epochs."""

    def __init__(self) -> None:
        self.iterator: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.iterator


def _training_requests(plan: BatchPlan, epoch: int, first_step: int, draws: Tensor, views: int) -> Iterator[Request]:
    for step in range(first_step, plan.steps_per_epoch(len(draws))):
        for part in plan.slices(step):
            yield draws[part].tolist(), Draw(plan.seed, epoch, views)


class StreamDataset(Dataset):
    """Random access to images on disk. Only one iterator of training batches at a time: a new one ends the previous."""

    def __init__(
        self,
        info: DatasetInfo,
        spec: Data,
        device: torch.device,
        splits: Mapping[str, StreamSplit],
        *,
        rules: ImageRules,
        workers: int,
    ) -> None:
        """`splits`: also 'unlabelled', the training images whose labels `data.labelled` removes."""
        super().__init__(info, spec, device, cropped=has_crops(spec))
        self._splits = dict(splits)
        self._rules, self._workers = rules, workers
        self._decoders = {name: _Decoder(split, spec, rules) for name, split in splits.items()}
        self._requests = _Requests()
        self._train_loader = self._loader("train", self._requests, workers, persistent=True)

    def without_labels(self) -> StreamDataset:
        reader, rows = self._splits["unlabelled"]
        split = StreamSplit(WithoutLabels(reader), rows)
        info = self.info.of_training(len(split.labels))
        return StreamDataset(info, self.spec, self.device, {"train": split}, rules=self._rules, workers=self._workers)

    def _loader(self, split: Split, requests: object, workers: int, persistent: bool) -> torch_data.DataLoader:
        return worker_loader(  # each request is a batch
            self._decoders[split],
            workers=workers,
            sampler=requests,
            persistent_workers=persistent and workers > 0,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # or the loader would draw its seed from the global state
        )

    def _decoded(self, loader: torch_data.DataLoader) -> Iterator[RawBatch]:
        for item in items(loader):
            if isinstance(item, InputError):
                raise item
            yield raw_batch(item, self.device)

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        count = self.info.sizes["train"]
        draws = self._draws(plan.seed, epoch, torch.device("cpu"))
        self._requests.iterator = _training_requests(plan, epoch, first_step, draws, self.views)
        decoded = self._decoded(self._train_loader)
        for _ in range(first_step, plan.steps_per_epoch(count)):
            yield [next(decoded) for _ in range(plan.accumulation)]

    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        stop = min(stop, self.info.sizes[split])
        requests: list[Request] = [
            (list(range(first, min(first + batch_size, stop))), None) for first in range(start, stop, batch_size)
        ]
        if not requests:
            return
        for raw in self._decoded(self._loader(split, requests, min(self._workers, len(requests)), persistent=False)):
            yield to_float(raw.images), raw.labels

    def labels(self, split: Split) -> Tensor:
        return self._splits[split].labels if split in self._splits else torch.empty(0, dtype=torch.int64)
