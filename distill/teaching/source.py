"""Teacher sources: the interface, and frozen networks. Others register in the group `teachers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data import BatchPlan
from distill.errors import InputError
from distill.features import Features
from distill.teaching.cache import TeacherCache
from distill.training.compilation import Compilation
from teachers import Teacher


class StepIndex(NamedTuple):
    """Position of a micro-batch in the run."""

    step: int
    """From 0."""
    micro_batch: int


class SourceContext(NamedTuple):
    """Arguments of a teacher source."""

    student: nn.Module
    """The student, initialised and on its device: images [B, C, H, W] in [0, 1] and `blocks` -> `Features`."""
    accelerator: Accelerator
    total_steps: int
    """Of the schedule, which `train.max_steps` does not change."""


class TeacherSource(ABC):
    """Teacher outputs for the views of a micro-batch; not trained by gradients."""

    @classmethod
    def build(cls, options: Any, context: SourceContext) -> TeacherSource:
        """A source with the options of a recipe."""
        return cls(options, context)  # type: ignore[call-arg]

    has_logits = True
    """Whether it has a classifier."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @abstractmethod
    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        """Forward pass on images [B, C, H, W] in [0, 1], by view; no logits without a classifier."""

    def map_shapes(self, names: Sequence[str] | None = None) -> dict[str, tuple[int, int, int]]:
        """(channels, height, width) of its feature maps `names`, by default of all its stages, first to last."""
        return {}

    def want(self, maps: Sequence[str]) -> None:
        """Return these feature maps from now on.

        Raises:
            InputError: no such maps.
        """
        if maps:
            raise InputError(f"teacher: {self.name} has no feature maps {', '.join(maps)}.")

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Update after optimizer step `step` (from 0), unless it was `skipped` (bool [], on the device)."""
        return

    def state_dict(self) -> dict[str, Tensor]:
        """State for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`."""
        return


class Frozen(TeacherSource):
    """A frozen network or ensemble, in the recipe's precision, compiled if the student is, with an optional cache of
    its logits.
    """

    def __init__(
        self,
        teacher: Teacher,
        accelerator: Accelerator,
        compilation: Compilation,
        plan: BatchPlan,
        *,
        steps_per_epoch: int,
        resolution: int,
    ) -> None:
        self._float32_teacher = teacher
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if precision is not None or compilation.enabled:
            teacher = teacher.with_weights_in(precision or torch.float32)
        self.teacher = teacher
        self.has_logits = teacher.num_classes > 0
        self.maps: tuple[str, ...] = ()
        self.cache: TeacherCache | None = None
        self._accelerator, self._compilation, self._plan = accelerator, compilation, plan
        self._steps_per_epoch, self._resolution = steps_per_epoch, resolution

    @property
    def name(self) -> str:
        return self.teacher.name

    def map_shapes(self, names: Sequence[str] | None = None) -> dict[str, tuple[int, int, int]]:
        if names is None:
            return self._float32_teacher.map_shapes(self._resolution)
        return self._float32_teacher.map_shapes(self._resolution, list(names))

    def want(self, maps: Sequence[str]) -> None:
        self.maps = tuple(maps)
        if self.maps:
            self.map_shapes(self.maps)  # a check in float32: the half-precision copy needs autocast
        self.teacher.prepare_maps(self.maps, self._resolution)
        if self._compilation.enabled:
            self._compilation.apply(self.teacher)

    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        # Only the logits of view 0 are cached.
        return [self._forward(images, index if view == 0 else None) for view, images in enumerate(views)]

    def _forward(self, images: Tensor, index: StepIndex | None) -> Features:
        with self._accelerator.autocast():
            if self.maps:
                output, maps = self.teacher(images, self.maps)
                return Features({"cls": output} if self.has_logits else {}, maps)
            if self.cache is None or index is None:
                return Features({"cls": self.teacher(images)}, {})
            epoch, step = divmod(index.step, self._steps_per_epoch)
            part = self._plan.slices(step)[index.micro_batch]
            return Features({"cls": self.cache.logits(epoch, part, lambda: self.teacher(images))}, {})
