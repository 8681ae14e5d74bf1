"""Batches, and the assignment of samples to batches and processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from distill.errors import InputError


class Batch(NamedTuple):
    """One micro-batch of one process, on its device."""

    images: Tensor
    """float32 [B, C, H, W] in [0, 1], augmented, not normalised."""
    targets: Tensor
    """float32 [B, classes], rows sum to 1; soft where samples were mixed, without label smoothing."""
    labels: Tensor
    """int64 [B], of the samples themselves."""
    indices: Tensor
    """int64 [B], positions in the training split."""
    views: tuple[Tensor, ...] = ()
    """Views 1, 2, ... of the same samples, each like `images`."""

    def first(self) -> Batch:
        """A batch of only its first sample, in view 0."""
        return Batch(self.images[:1], self.targets[:1], self.labels[:1], self.indices[:1])

    def digest(self) -> str:
        """SHA-256 (hex) of indices, pixels and targets."""
        digest = hashlib.sha256()
        for part in (self.indices, self.images, self.targets):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class BatchPlan:
    """Global batch s of epoch e is order(e)[s * batch_size : (s + 1) * batch_size]; each process takes a contiguous
    part of it, in `accumulation` contiguous micro-batches. `seed`: of order and augmentation.
    """

    seed: int
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.process_index < self.num_processes
        self._divide(1, "")

    def _divide(self, unit: int, why: str) -> None:
        parts = self.num_processes * self.accumulation * unit
        if self.batch_size % parts or not self.batch_size:
            near = max(1, round(self.batch_size / parts)) * parts
            raise InputError(
                f"train.batch_size: {self.batch_size} does not divide over {self.num_processes} process(es) x "
                f"{self.accumulation} micro-batch(es){why}; take a multiple of {parts}, such as {near}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples in one micro-batch of one process."""
        return self.batch_size // (self.num_processes * self.accumulation)

    def check(self, num_samples: int, paired: bool) -> None:
        """Raise InputError if the split is smaller than a batch, or (paired: mixup, CutMix) micro-batches are odd."""
        if paired:
            self._divide(2, " of pairs (mixup and cutmix mix two by two)")
        self.steps_per_epoch(num_samples)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Optimizer steps per epoch, without an incomplete last batch; raises InputError if there are none."""
        if num_samples < self.batch_size:
            raise InputError(
                f"train.batch_size: {self.batch_size} is more than the {num_samples} images of the training split; "
                f"take at most {num_samples}"
            )
        return num_samples // self.batch_size

    def slices(self, step: int) -> list[slice]:
        """Positions of this process's micro-batches in the epoch's order, for optimizer step `step` of the epoch."""
        size = self.micro_batch
        start = step * self.batch_size + self.process_index * self.accumulation * size
        return [slice(start + part * size, start + (part + 1) * size) for part in range(self.accumulation)]
