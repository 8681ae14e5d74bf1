"""What teaches, as the steps ask it: a frozen network here; other sources register under `teachers`."""

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
    """Which micro-batch is asked about."""

    step: int
    """Optimizer steps before this one."""
    micro_batch: int


class SourceContext(NamedTuple):
    """What a source of teaching is built with."""

    student: nn.Module
    """The student, initialised and on its device: images [B, C, H, W] in [0, 1] and `blocks` -> its outputs."""
    accelerator: Accelerator
    total_steps: int


class TeacherSource(ABC):
    """What teaches: answers to the views of a micro-batch. Nothing of it is trained by gradients."""

    @classmethod
    def build(cls, options: Any, context: SourceContext) -> TeacherSource:
        """One source, from the options of a recipe."""
        return cls(options, context)  # type: ignore[call-arg]

    has_logits = True
    """Whether it has a classifier."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @abstractmethod
    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        """What it answers to images [B, C, H, W] in [0, 1], by view; no logits without a classifier."""

    def map_shapes(self, names: Sequence[str] | None = None) -> dict[str, tuple[int, int, int]]:
        """(channels, height, width) of its feature maps by name: of those, or of its own stages, first to last."""
        return {}

    def want(self, maps: Sequence[str]) -> None:
        """Answer with these feature maps from now on.

        Raises:
            InputError: there are no such maps.
        """
        if maps:
            raise InputError(f"teacher: {self.name} has no feature maps {', '.join(maps)}.")

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Follow the student's step `step` (from 0); `skipped` (bool [], on the device): its weights did not change."""
        return

    def state_dict(self) -> dict[str, Tensor]:
        """What checkpoints keep of it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        return


class Frozen(TeacherSource):
    """A frozen network, or an ensemble, in the recipe's precision, compiled if the student is; its logits come from the
    cache where that has them.
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
        self._shapes_of = teacher
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
            return self._shapes_of.map_shapes(self._resolution)
        return self._shapes_of.map_shapes(self._resolution, list(names))

    def want(self, maps: Sequence[str]) -> None:
        self.maps = tuple(maps)
        if self.maps:
            self.map_shapes(self.maps)  # checks them, which the copy in half precision cannot outside of autocast
        self.teacher.prepare_maps(self.maps, self._resolution)
        if self._compilation.enabled:
            self._compilation.apply(self.teacher)

    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        return [self._ask(images, index if view == 0 else None) for view, images in enumerate(views)]

    def _ask(self, images: Tensor, index: StepIndex | None) -> Features:
        """Stored are the logits of view 0 alone."""
        with self._accelerator.autocast():
            if self.maps:
                output, maps = self.teacher(images, self.maps)
                return Features({"cls": output} if self.has_logits else {}, maps)
            if self.cache is None or index is None:
                return Features({"cls": self.teacher(images)}, {})
            epoch, step = divmod(index.step, self._steps_per_epoch)
            part = self._plan.slices(step)[index.micro_batch]
            return Features({"cls": self.cache.logits(epoch, part, lambda: self.teacher(images))}, {})
