"""Streamed data: worker processes decode images on demand; augmentation runs on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from distill.data.randomness import hashes, keys, permutation
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


class StreamSplit(NamedTuple):
    """A reader, and its rows that make up the split (None: all)."""

    reader: Reader
    rows: Tensor | None

    @property
    def labels(self) -> Tensor:
        return self.reader.labels if self.rows is None else self.reader.labels[self.rows]


class Draw(NamedTuple):
    """Arguments of a training image's random crop, besides its index."""

    seed: int
    epoch: int


Request = tuple[list[int], Draw | None]
"""The positions of a batch in its split, and the draw of its crops (None: centre crops)."""


@lru_cache(maxsize=4)
def _crop_keys(draw: Draw) -> Tensor:
    return keys(draw.seed, draw.epoch, RESIZED_CROP_DRAWS)


def crop_box(
    image: Image.Image, index: int, draw: Draw | None, crop: RandomResizedCrop | None, fit: str = "crop"
) -> Box | None:
    """The random crop of a sample: the draws of data in memory, applied to the image's own size (its `frame`); None
    without either.
    """
    if draw is None or crop is None:
        return None
    hashed = hashes(_crop_keys(draw), torch.tensor([index]))
    top, left, height, width = (int(side) for side in crop_boxes(hashed, *frame(image, fit), crop.scale, crop.ratio))
    return top, left, height, width


class _Decoder(torch_data.Dataset):
    """Runs in the workers: a request -> uint8 [B, C, R, R], labels and positions.

    Returns errors of broken images instead of raising them, since the loader would add the worker's stack trace.
    """

    def __init__(self, split: StreamSplit, resolution: int, rules: ImageRules, crop: RandomResizedCrop | None) -> None:
        self.split, self.resolution, self.rules, self.crop = split, resolution, rules, crop

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, Tensor] | InputError:
        positions, draw = request
        indices = torch.tensor(positions)
        rows = indices if self.split.rows is None else self.split.rows[indices]
        images = []
        try:
            for position, row in zip(positions, rows.tolist(), strict=True):
                image = decode(*self.split.reader.source(row), self.rules)
                box = crop_box(image, position, draw, self.crop, self.rules.fit)
                images.append(to_square(image, self.resolution, box, self.rules))
        except InputError as error:
            return error
        return torch.stack(images), self.split.reader.labels[rows], indices


class _Requests(torch_data.Sampler):
    """The requests of the current epoch, replaced in place, since the loader's workers persist over epochs."""

    def __init__(self) -> None:
        self.iterator: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.iterator


def _training_requests(plan: BatchPlan, epoch: int, first_step: int, count: int) -> Iterator[Request]:
    order = permutation(plan.seed, epoch, count)
    for step in range(first_step, plan.steps_per_epoch(count)):
        for part in plan.slices(step):
            yield order[part].tolist(), Draw(plan.seed, epoch)


class StreamDataset(Dataset):
    """Random access to images on disk. Only one iterator of training batches at a time: a new one ends the previous."""

    def __init__(
        self,
        info: DatasetInfo,
        spec: Data,
        device: torch.device,
        splits: Mapping[Split, StreamSplit],
        *,
        rules: ImageRules,
        workers: int,
    ) -> None:
        crop = spec.augment.random_resized_crop
        super().__init__(info, spec, device, cropped=crop is not None)
        self._splits = dict(splits)
        self._workers = workers
        self._decoders = {name: _Decoder(split, spec.resolution, rules, crop) for name, split in splits.items()}
        self._requests = _Requests()
        self._train_loader = self._loader("train", self._requests, workers, persistent=True)

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
            yield RawBatch(*(tensor.to(self.device, non_blocking=True) for tensor in item))

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        count = self.info.sizes["train"]
        self._requests.iterator = _training_requests(plan, epoch, first_step, count)
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
