"""What the teacher says to the micro-batches of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.data import BatchPlan
from distill.objectives import Seen
from distill.teaching.cache import TeacherCache
from distill.training.compilation import Compilation
from teachers import Teacher


class Lessons:
    """The teacher as the steps ask it: in the recipe's precision, compiled if the student is, its logits from the cache
    where that has them.
    """

    def __init__(
        self,
        teacher: Teacher,
        maps: tuple[str, ...],
        accelerator: Accelerator,
        compilation: Compilation,
        plan: BatchPlan,
        *,
        steps_per_epoch: int,
        resolution: int,
    ) -> None:
        """Lessons of `teacher`, with the feature `maps` of these names.

        Raises:
            InputError: it has no such maps.
        """
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if precision is not None or compilation.enabled:
            teacher = teacher.with_weights_in(precision or torch.float32)
        teacher.prepare_maps(maps, resolution)
        if compilation.enabled:
            compilation.apply(teacher)
        self.teacher, self.maps = teacher, maps
        self.cache: TeacherCache | None = None
        self._accelerator, self._plan, self._steps_per_epoch = accelerator, plan, steps_per_epoch

    def seen(self, images: Tensor, step: int, micro_batch: int) -> Seen:
        """What the teacher says to a micro-batch, images [B, C, H, W], of a step (both from 0)."""
        if self.maps:
            with self._accelerator.autocast():
                return Seen(*self.teacher(images, self.maps))

        def ask() -> Tensor:
            with self._accelerator.autocast():
                return self.teacher(images)

        return Seen(self._through_cache(ask, step, micro_batch), {})

    def _through_cache(self, ask: Callable[[], Tensor], step: int, micro_batch: int) -> Tensor:
        if self.cache is None:
            return ask()
        epoch, step = divmod(step, self._steps_per_epoch)
        return self.cache.logits(epoch, self._plan.slices(step)[micro_batch], ask)
