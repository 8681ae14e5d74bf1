"""The dataset interface of the trainer, and datasets held in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.data.augment import Augmenter, to_float
from distill.data.batches import Batch, BatchPlan
from distill.data.imbalance import balanced_draws
from distill.data.mixing import one_hot
from distill.data.randomness import permutation
from distill.data.views import MultiCrop
from distill.errors import InputError
from distill.recipe import Data

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a dataset."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    """Per channel, of images in [0, 1]: exact over a training split in memory, ImageNet's for streams."""
    std: tuple[float, ...]
    digest: str
    """SHA-256 (hex) that identifies the data."""
    sizes: dict[str, int]
    """Images in 'train', 'validation' (0: no such split) and 'test'."""
    class_images: tuple[int, ...] = ()
    """Labelled training images of each class; empty: not counted."""
    pixels: str = ""
    """The sizes of the images as they are stored, in words; empty: not known."""
    fitted: bool = False
    """Whether they are resized and cropped to `data.resolution`, by `data.fit`."""
    pack: str | None = None
    """The packed file."""
    held_out: tuple[str, ...] = ()
    """The images that `data.test` held out of all of them: files, else numbers from 0."""
    left_out: tuple[str, ...] = ()
    """Files that are not used (`data.skip_unreadable`), each with the reason."""
    unlabelled: int = 0
    """Further training images, which have no label (`data.unlabelled`, `data.labelled`); in none of `sizes`."""
    unlabelled_digest: str = ""
    """SHA-256 (hex) that identifies the images of `data.unlabelled`, which `digest` leaves out."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def of_training(self, size: int) -> DatasetInfo:
        """The same with so many training images and no other split."""
        return replace(self, sizes={"train": size, "validation": 0, "test": 0}, class_images=(), left_out=())


class RawBatch(NamedTuple):
    """On the device."""

    images: Tensor
    """uint8 [B, C, H, W]: the whole images or, of a stream with random crops, those of view 0."""
    labels: Tensor
    """int64 [B]"""
    draws: Tensor
    """int64 [B], of N training images: draw d is that at position d % N of the split, augmented by d."""
    crops: tuple[Tensor, ...] = ()
    """Random crops of views 1, 2, ..., uint8 [B, C, size, size] each."""


class Dataset(ABC):
    """Batches of one dataset for one process, on its device."""

    in_order = False
    """Whether training images come in the order of a reader, without random access."""
    streamed = True
    """Whether images are read while training."""

    def __init__(self, info: DatasetInfo, spec: Data, device: torch.device, *, cropped: bool) -> None:
        """`cropped`: random crops have been cut from the images when they were decoded, one for each view."""
        self.info, self.spec = info, spec
        self.device = device
        self.views = 1
        self.augmenter: Augmenter | MultiCrop
        if spec.views is not None:
            self.augmenter = MultiCrop(spec.views, device, cropped=cropped)
        else:
            self.augmenter = Augmenter(
                spec.augment, num_classes=info.num_classes, mean=info.mean, std=info.std, device=device, cropped=cropped
            )

    def set_views(self, views: int | Literal["all"]) -> None:
        """Set the number of augmented views of each training image; "all": those that `data.views` names.

        Raises:
            InputError: it names fewer, or none.
        """
        named = len(self.spec.view_sizes)
        if views == "all":
            if not named:
                raise InputError("data.views: a method compares several views of an image; name them there.")
            views = named
        elif 0 < named < views:
            raise InputError(f"data.views: a method needs {views} views of each image, got {named}.")
        self.views = views

    @property
    def augmenters(self) -> list[Augmenter | MultiCrop]:
        """All that its batches go through; `augmenter` is the first."""
        return [self.augmenter]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of training images."""
        return self.info.channels, self.spec.resolution, self.spec.resolution

    def steps_per_epoch(self, plan: BatchPlan) -> int:
        """Optimizer steps per epoch; raises InputError if the plan does not fit the data."""
        plan.check(self.info.sizes["train"], self.augmenter.paired)
        return plan.steps_per_epoch(self.info.sizes["train"])

    def use_unlabelled(self, wanted: bool) -> None:
        """Whether training batches have images without a label, if there are any; see `MixedDataset`."""
        return

    def labelled_images(self, plan: BatchPlan) -> float | None:
        """Labelled images of a micro-batch, in the mean over those of a global batch; None: all are labelled."""
        return None

    def without_labels(self) -> Dataset:
        """A dataset of the training images whose labels `data.labelled` removes, with labels -1."""
        raise InputError(f"data.labelled: '{self.spec.name}' gives no random access to its images; set it to null")

    def training_batches(self, plan: BatchPlan, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step, from `first_step` of the epoch on.

        Order and augmentation are functions of (plan.seed, epoch, index, view). Raises InputError at once, not at the
        first batch, if the plan does not fit the data.
        """
        self.steps_per_epoch(plan)
        return self._augmented(plan, epoch, first_step)

    def _augmented(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        size = self.info.sizes["train"]
        for step in self._raw_steps(plan, epoch, first_step):
            micro_batches = []
            for raw in step:
                (images, *views), targets = self._views(raw, plan.seed, epoch)
                micro_batches.append(Batch(images, targets, raw.labels, raw.draws % size, tuple(views)))
            yield micro_batches

    def _views(self, raw: RawBatch, seed: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """The images by view, and the targets of the first."""
        given = (raw.images, *raw.crops)
        if isinstance(self.augmenter, MultiCrop):
            views = self.augmenter(given, raw.draws, seed=seed, epoch=epoch, views=self.views)
            return views, one_hot(raw.labels, self.info.num_classes)
        made = [
            self.augmenter(given[view if raw.crops else 0], raw.labels, raw.draws, seed=seed, epoch=epoch, view=view)
            for view in range(self.views)
        ]
        return [images for images, _ in made], made[0][1]

    def _draws(self, seed: int, epoch: int, device: torch.device) -> Tensor:
        """The draws of an epoch in their order, int64 [training images]; see `RawBatch.draws`."""
        size = self.info.sizes["train"]
        if self.spec.sampler is None or bool((labels := self.labels("train")).min() < 0):  # images without labels
            return permutation(seed, epoch, size, device)
        return balanced_draws(labels, seed, epoch).to(device)

    @abstractmethod
    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        """As `training_batches`, before augmentation."""

    @abstractmethod
    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images start .. stop - 1 of a split (or to its end), in file order, unaugmented: float32 [B, C, H, W] in
        [0, 1] and labels int64 [B], on the device.
        """

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """int64 [size of the split], on the CPU, in file order; empty if there is no such split."""


class ResidentSplit(NamedTuple):
    """Tensors as in the file (perhaps memory-mapped), and the rows that make up the split (None: all)."""

    images: Tensor
    labels: Tensor
    rows: Tensor | None

    @property
    def size(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)

    @property
    def own_labels(self) -> Tensor:
        """int64 [size]."""
        return self.labels if self.rows is None else self.labels[self.rows]


class ResidentDataset(Dataset):
    """uint8 tensors on the device; splits are row indices into them, without copies."""

    streamed = False

    def __init__(
        self, info: DatasetInfo, spec: Data, device: torch.device, splits: Mapping[str, ResidentSplit]
    ) -> None:
        """`splits`: also 'unlabelled', the training images whose labels `data.labelled` removes."""
        super().__init__(info, spec, device, cropped=False)
        moved: dict[int, Tensor] = {}

        def on_device(tensor: Tensor) -> Tensor:  # train and validation share tensors: move them once
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        self._cpu_labels = {name: split.own_labels for name, split in splits.items()}
        self._splits = {
            name: ResidentSplit(
                on_device(split.images), on_device(split.labels), None if split.rows is None else split.rows.to(device)
            )
            for name, split in splits.items()
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._splits["train"].images.shape[1:]
        return channels, height, width

    def without_labels(self) -> ResidentDataset:
        images, labels, rows = self._splits["unlabelled"]
        return self.of_images(images, torch.full_like(labels, -1), rows)

    def of_images(self, images: Tensor, labels: Tensor, rows: Tensor | None = None) -> ResidentDataset:
        """A dataset with these training images and no other split."""
        split = ResidentSplit(images, labels, rows)
        return ResidentDataset(self.info.of_training(split.size), self.spec, self.device, {"train": split})

    def pixels(self, split: Split) -> Iterator[bytes]:
        """SHA-256 of each image of a split."""
        if (source := self._splits.get(split)) is None:
            return
        for positions in torch.arange(source.size).split(4096):
            for image in self._take(source, positions.to(self.device))[0].cpu().numpy():
                yield hashlib.sha256(image.tobytes()).digest()

    def _take(self, split: ResidentSplit, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = positions if split.rows is None else split.rows.index_select(0, positions)
        return split.images.index_select(0, rows), split.labels.index_select(0, rows)

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        train = self._splits["train"]
        draws = self._draws(plan.seed, epoch, self.device)
        order = draws % train.size
        for step in range(first_step, plan.steps_per_epoch(train.size)):
            yield [RawBatch(*self._take(train, order[part]), draws[part]) for part in plan.slices(step)]

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
