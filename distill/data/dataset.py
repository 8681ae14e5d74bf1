"""What the trainer sees of the data, wherever they come from; and the data that are held in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.data.augment import Augmenter, to_float
from distill.data.batches import Batch, BatchPlan
from distill.data.randomness import permutation
from distill.errors import InputError
from distill.recipe import Data

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of the data without looking at them."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    """Per channel, of images in [0, 1]: exact over the training split where it is held in memory, ImageNet's for
    streams.
    """
    std: tuple[float, ...]
    digest: str
    """SHA-256 (hex) that identifies the data."""
    sizes: dict[str, int]
    """Images in 'train', 'validation' (0 where there is none) and 'test'."""
    left_out: tuple[str, ...] = ()
    """Files that are there and not used, as the recipe allows: each with the reason."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class RawBatch(NamedTuple):
    """uint8 [B, C, H, W], int64 [B], int64 [B] (positions in the training split), on the device."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Dataset(ABC):
    """Batches of one dataset for one process, on its device."""

    def __init__(self, info: DatasetInfo, spec: Data, device: torch.device, *, cropped: bool) -> None:
        self.info = info
        self.device = device
        self.views = 1
        self._cropped = cropped
        self.augmenter = Augmenter(
            spec.augment, num_classes=info.num_classes, mean=info.mean, std=info.std, device=device, cropped=cropped
        )

    def set_views(self, views: int) -> None:
        """Let training batches have so many augmented views of each image.

        Raises:
            InputError: images come cropped already, once for all views.
        """
        if views > 1 and self._cropped:
            raise InputError(
                "data.augment.random_resized_crop: a stream crops an image once, and a method wants "
                f"{views} views of it. Set data.stream=false, or crop by data.augment.crop_padding."
            )
        self.views = views

    def training_batches(self, plan: BatchPlan, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of the epoch, from `first_step` (counted within the epoch) on.

        Order and augmentation are functions of (plan.seed, epoch, index, view). Raises InputError at the call, not at
        the first batch, if the plan does not fit the data.
        """
        plan.check(self.info.sizes["train"], self.augmenter.paired)
        return self._augmented(plan, epoch, first_step)

    def _augmented(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        for step in self._raw_steps(plan, epoch, first_step):
            micro_batches = []
            for raw in step:
                (images, targets), *others = (
                    self.augmenter(raw.images, raw.labels, raw.indices, seed=plan.seed, epoch=epoch, view=view)
                    for view in range(self.views)
                )
                views = tuple(of_view for of_view, _ in others)
                micro_batches.append(Batch(images, targets, raw.labels, raw.indices, views))
            yield micro_batches

    @abstractmethod
    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        """The same before augmentation."""

    @abstractmethod
    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images start .. stop - 1 of a split (less where it ends before), in file order, unaugmented: float32 [B, C,
        H, W] in [0, 1] and labels int64 [B], on the device.
        """

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """int64 [size of the split], on the CPU, in file order; empty for a split that there is not."""


class ResidentSplit(NamedTuple):
    """Tensors as they are in the file (perhaps memory-mapped), and which rows make up the split (None: all)."""

    images: Tensor
    labels: Tensor
    rows: Tensor | None

    @property
    def size(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)


class ResidentDataset(Dataset):
    """uint8 tensors held once on the device. Rows of splits are indices into them: nothing is copied on a CPU."""

    def __init__(
        self, info: DatasetInfo, spec: Data, device: torch.device, splits: Mapping[Split, ResidentSplit]
    ) -> None:
        super().__init__(info, spec, device, cropped=False)
        moved: dict[int, Tensor] = {}

        def on_device(tensor: Tensor) -> Tensor:  # the tensors that train and validation share must not move twice
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        self._cpu_labels = {
            name: split.labels if split.rows is None else split.labels[split.rows] for name, split in splits.items()
        }
        self._splits = {
            name: ResidentSplit(
                on_device(split.images), on_device(split.labels), None if split.rows is None else split.rows.to(device)
            )
            for name, split in splits.items()
        }

    def _take(self, split: ResidentSplit, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = positions if split.rows is None else split.rows.index_select(0, positions)
        return split.images.index_select(0, rows), split.labels.index_select(0, rows)

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        train = self._splits["train"]
        order = permutation(plan.seed, epoch, train.size, self.device)
        for step in range(first_step, plan.steps_per_epoch(train.size)):
            yield [RawBatch(*self._take(train, order[part]), order[part]) for part in plan.slices(step)]

    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in self._splits:
            return
        source = self._splits[split]
        stop = min(stop, source.size)
        for first in range(start, stop, batch_size):
            positions = torch.arange(first, min(first + batch_size, stop), device=self.device)
            images, labels = self._take(source, positions)
            yield to_float(images), labels

    def labels(self, split: Split) -> Tensor:
        return self._cpu_labels.get(split, torch.empty(0, dtype=torch.int64))
