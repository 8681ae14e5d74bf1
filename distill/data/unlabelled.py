"""Batches of labelled and unlabelled training images (`data.unlabelled`, `data.labelled`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from distill.data.augment import Augmenter
from distill.data.batches import Batch, BatchPlan
from distill.data.dataset import Dataset, RawBatch, ResidentDataset, Split
from distill.data.views import MultiCrop
from distill.errors import InputError

OTHER_DRAWS = 1 << 32
"""Added to the seed of the unlabelled images, so that their order and augmentation are draws of their own."""
_log = logging.getLogger("distill")


@dataclass(frozen=True)
class Layout:
    """Which images of a global batch are labelled: so many, spread evenly, the first one among them."""

    batch_size: int
    labelled: int
    unit: int = 1
    """Neighbours of one kind: 2 where pairs are mixed, so that an image with a label is mixed with another one."""

    @cached_property
    def mask(self) -> Tensor:
        """bool [batch_size]."""
        units, labelled = self.batch_size // self.unit, self.labelled // self.unit
        return (torch.arange(units) * -labelled % units < labelled).repeat_interleave(self.unit)

    def before(self, kind: bool) -> list[int]:
        """How many of this kind (labelled: true) are among the first n, for n from 0 to the batch size."""
        return [0, *(self.mask == kind).cumsum(0).tolist()]


@dataclass(frozen=True, kw_only=True)
class PartPlan(BatchPlan):
    """The images of one kind in the batches of a `Layout`; `batch_size` is their number in a global batch. Those of a
    micro-batch are again contiguous in their own order; micro-batches may differ in how many they have.
    """

    layout: Layout
    kind: bool
    """Whether they are the labelled ones."""

    def __post_init__(self) -> None:
        """The whole plan has been checked."""

    def check(self, num_samples: int, paired: bool) -> None:
        self.steps_per_epoch(num_samples)

    def slices(self, step: int) -> list[slice]:
        first, before = step * self.batch_size, self.layout.before(self.kind)
        whole = replace_size(self, self.layout.batch_size)
        return [slice(first + before[part.start], first + before[part.stop]) for part in whole.slices(0)]


def replace_size(plan: BatchPlan, batch_size: int) -> BatchPlan:
    """A plain plan with this batch size, over the same processes and micro-batches."""
    return BatchPlan(plan.seed, batch_size, plan.accumulation, plan.num_processes, plan.process_index)


class MixedDataset(Dataset):
    """Two datasets in one: every batch has a fixed number of labelled and of unlabelled images, these with label -1 and
    targets of zeros, and indices that follow those of the labelled ones.

    An epoch is one pass over the part that takes more steps; the other one goes around in passes of its own, which go
    on over the epochs. Order and augmentation are functions of (seed, pass, index), and the pass is one of (epoch,
    step), so that resumption and any number of processes give the same batches. Pairs are mixed within one kind:
    between two kinds the target would be a label of less than weight 1, and no mean over labelled images.

    Without unlabelled images (`use_unlabelled`, or a share of 0) all images of a batch are labelled, and an epoch has
    the same number of steps. Evaluation and all facts of the data are of the labelled dataset.
    """

    def __init__(self, labelled: Dataset, unlabelled: Dataset, digest: str = "") -> None:
        """`digest`: of unlabelled images that are not of the labelled dataset's files."""
        self.labelled, self.unlabelled = labelled, unlabelled
        self.spec, self.device, self.streamed = labelled.spec, labelled.device, labelled.streamed or unlabelled.streamed
        self.info = replace(
            labelled.info,
            unlabelled=unlabelled.info.sizes["train"],
            unlabelled_digest=digest,
            left_out=(*labelled.info.left_out, *unlabelled.info.left_out),
        )
        self.augmenter = labelled.augmenter
        self._alone = self.spec.unlabelled_share == 0

    @property
    def augmenters(self) -> list[Augmenter | MultiCrop]:
        return [self.labelled.augmenter, self.unlabelled.augmenter]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.labelled.image_shape

    def set_views(self, views: int | Literal["all"]) -> None:
        for part in (self.labelled, self.unlabelled):
            part.set_views(views)

    def use_unlabelled(self, wanted: bool) -> None:
        self._alone = not wanted or self.spec.unlabelled_share == 0

    def labelled_images(self, plan: BatchPlan) -> float | None:
        own = self._labelled_plan(plan)
        return own.batch_size / (plan.num_processes * plan.accumulation) if isinstance(own, PartPlan) else None

    def layout(self, plan: BatchPlan) -> Layout:
        """Which images of a batch are labelled; as near to the share as whole images, or pairs, allow.

        Raises:
            InputError: the plan does not fit the data, or a micro-batch would have images of one kind only.
        """
        plan.check(plan.batch_size, self.augmenter.paired)
        own, other = self.info.sizes["train"], self.info.unlabelled
        share = self.spec.unlabelled_share or other / (own + other)
        unit = 2 if self.augmenter.paired else 1
        units, parts = plan.batch_size // unit, plan.num_processes * plan.accumulation
        labelled = min(max(round(units * (1 - share)), 1), units - 1)
        if min(labelled, units - labelled) < parts:
            what = f"{labelled * unit} labelled and {(units - labelled) * unit} unlabelled images"
            raise InputError(
                f"data.unlabelled_share: a batch of {plan.batch_size} would have {what}, too few for {parts} "
                f"micro-batch(es) with {'pairs' if unit > 1 else 'images'} of both kinds; take a larger "
                "train.batch_size, or a share nearer to 0.5"
            )
        layout = Layout(plan.batch_size, labelled * unit, unit)
        for kind, size, each in (("", own, layout.labelled), ("un", other, plan.batch_size - layout.labelled)):
            if size < each:
                raise InputError(
                    f"data.unlabelled_share: a batch would have {each} {kind}labelled images, of {size} that there "
                    "are; change it, or take a smaller train.batch_size"
                )
        return layout

    def steps_per_epoch(self, plan: BatchPlan) -> int:
        layout = self.layout(plan)
        own, other = self.info.sizes["train"], self.info.unlabelled
        return max(own // layout.labelled, other // (plan.batch_size - layout.labelled))

    def training_batches(self, plan: BatchPlan, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        steps = self.steps_per_epoch(plan)
        off = 0 < self.spec.augment.mix_off_epoch <= epoch
        at, number = epoch * steps + first_step, steps - first_step
        own = self._labelled_plan(plan)
        labelled = _passes(self.labelled, own, at, number, off)
        if self._alone:
            return labelled
        layout = self.layout(plan)
        rest = PartPlan(
            plan.seed | OTHER_DRAWS,
            plan.batch_size - layout.labelled,
            plan.accumulation,
            plan.num_processes,
            plan.process_index,
            layout=layout,
            kind=False,
        )
        return self._merged(layout, plan, labelled, _passes(self.unlabelled, rest, at, number, off))

    def _labelled_plan(self, plan: BatchPlan) -> BatchPlan:
        layout = self.layout(plan)
        if self._alone:  # full batches, unless there are fewer images
            size = self.info.sizes["train"] // layout.unit * layout.unit
            if size >= plan.batch_size:
                return plan
            layout = replace(layout, labelled=size)
            if size < layout.unit * plan.num_processes * plan.accumulation:
                raise InputError(
                    f"data: {size} labelled images are too few for {plan.num_processes * plan.accumulation} "
                    "micro-batches; keep more labels, or take fewer micro-batches"
                )
        return PartPlan(
            plan.seed,
            layout.labelled,
            plan.accumulation,
            plan.num_processes,
            plan.process_index,
            layout=layout,
            kind=True,
        )

    def _merged(
        self, layout: Layout, plan: BatchPlan, labelled: Iterator[list[Batch]], unlabelled: Iterator[list[Batch]]
    ) -> Iterator[list[Batch]]:
        offset = self.info.sizes["train"]
        orders = []
        for part in plan.slices(0):
            mask = layout.mask[part]
            number = int(mask.sum())
            orders.append(torch.where(mask, mask.cumsum(0) - 1, number + (~mask).cumsum(0) - 1).to(self.device))
        for own, other in zip(labelled, unlabelled, strict=True):
            yield [_in_order(*parts, offset) for parts in zip(own, other, orders, strict=True)]

    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.labelled.evaluation_batches(split, start, stop, batch_size)

    def labels(self, split: Split) -> Tensor:
        return self.labelled.labels(split)

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        raise AssertionError("the two parts have them, each with a plan of its own")


def _passes(dataset: Dataset, plan: BatchPlan, at: int, number: int, unmixed: bool) -> Iterator[list[Batch]]:
    """`number` steps from step `at` of the run on, in one pass over the dataset after another."""
    in_pass = dataset.steps_per_epoch(plan)
    first_pass, first = divmod(at, in_pass)
    if isinstance(dataset.augmenter, Augmenter):
        dataset.augmenter.unmixed = unmixed  # by the run's epochs, not by these passes
    for index in count(first_pass):
        for step in dataset.training_batches(plan, index, first):
            if number <= 0:
                return
            number -= 1
            yield step
        first = 0


def _in_order(labelled: Batch, unlabelled: Batch, order: Tensor, offset: int) -> Batch:
    """Both in one batch; `order`: for each of its images the position in labelled + unlabelled."""

    def joined(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other]).index_select(0, order)

    return Batch(
        images=joined(labelled.images, unlabelled.images),
        targets=joined(labelled.targets, unlabelled.targets),
        labels=joined(labelled.labels, unlabelled.labels),
        indices=joined(labelled.indices, unlabelled.indices + offset),
        views=tuple(map(joined, labelled.views, unlabelled.views)),
    )


def count_leaks(dataset: Dataset) -> int | None:
    """How many unlabelled images are also in the validation or test split, pixel by pixel; None: some are streamed, and
    none was looked at.
    """
    if not isinstance(dataset, MixedDataset):
        return 0
    own, other = dataset.labelled, dataset.unlabelled
    if not isinstance(own, ResidentDataset) or not isinstance(other, ResidentDataset):
        return None
    held_out = {digest for split in ("validation", "test") for digest in own.pixels(split)}
    return sum(digest in held_out for digest in other.pixels("train"))


def warn_of_leaks(dataset: Dataset) -> None:
    """Log how many unlabelled images are also in the validation or test split."""
    leaks = count_leaks(dataset)
    if leaks is None:
        _log.info("data: streamed images are not looked up in the validation and test splits")
    elif leaks:
        _log.warning(
            "data: %d of %d unlabelled images are also in the validation or test split, pixel by pixel: their labels "
            "are not learned, but a figure for images that were never seen needs others",
            leaks, dataset.info.unlabelled,
        )  # fmt: skip
