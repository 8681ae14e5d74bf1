"""The student's own moving average as its teacher: Tarvainen and Valpola 2017 (arXiv 1703.01780), with the momentum
schedule of Grill et al. 2020 (BYOL, arXiv 2006.07733) and Caron et al. 2021 (DINO, arXiv 2104.14294, section 3.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from distill.features import Features, by_size, split
from distill.methods.base import Method
from distill.recipe.schema import AverageTeacher
from distill.students import Student
from distill.students.attention.base import AttentionKind, named_in
from distill.teaching.source import StepIndex, TeacherSource


class MovingAverage(TeacherSource):
    """average += (1 - momentum) (student - average) after each step that is not skipped, of parameters only.

    As in the published code it stays in training mode, so batch norms use the statistics of the batch, and their
    running statistics, which evaluation uses, are its own; it has no drop path and no dropout. What attention kinds do
    not average, such as random features, is the student's. It starts as the student, and is the same on all processes,
    since their students are.
    """

    has_logits = False

    def __init__(self, student: Student, options: AverageTeacher, *, total_steps: int) -> None:
        """A copy of the student, which is not compiled yet; `total_steps` of all epochs of the recipe."""
        self.options, self.total_steps = options, total_steps
        self.student = copy.deepcopy(student).requires_grad_(False).train()
        """The averaged weights, evaluated and exported as `ema`."""
        for module in self.student.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0  # type: ignore[assignment]
            elif isinstance(module, _DropoutNd):
                module.p = 0.0
        copied = named_in(student, AttentionKind, "not_averaged")
        averages, values = self.student.state_dict(), student.state_dict()
        counts = {name for name, value in values.items() if not value.is_floating_point()}
        counts = {name for name in counts if not name.endswith("num_batches_tracked")}
        self._copied = [(averages[name], values[name]) for name in sorted(copied | counts)]
        self._averages: list[nn.Parameter] = []
        self._values: list[nn.Parameter] = []
        self._average(self.student, student)

    @property
    def name(self) -> str:
        return "the student's moving average"

    def follow(self, methods: Iterable[Method]) -> None:
        """Also average the modules that methods name in `Method.averaged`."""
        for method in methods:
            for average, module in method.averaged():
                self._average(average, module)

    def _average(self, average: nn.Module, module: nn.Module) -> None:
        # Both change in place only, so these references stay valid.
        self._averages += average.parameters()
        self._values += module.parameters()

    @torch.no_grad()
    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        """Embeddings and regions of views [B, C, H, W], those of one size in one forward pass."""
        if not self.student.training:  # evaluation leaves it so
            self.student.train()
        found: dict[int, Features] = {}
        for group in by_size(views):
            images = torch.cat([views[view] for view in group])
            features = self.student(images, side=images.shape[-1], embed=True)
            found |= zip(group, split(features, len(group)), strict=True)
        return [found[view] for view in range(len(views))]

    def momentum(self, step: int) -> float:
        """Of step `step` (from 0): cosine from `momentum` to `momentum_end` over the run."""
        start, end = self.options.momentum, self.options.momentum_end
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / self.total_steps))

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor) -> None:
        move_towards(self._averages, self._values, (~skipped).float() * (1.0 - self.momentum(step)))
        for average, value in self._copied:
            average.copy_(value)


def move_towards(averages: Sequence[Tensor], values: Sequence[Tensor], share: Tensor) -> None:
    """average += share (value - average), in place; `share`: a scalar on the device. Without synchronising."""
    averages = list(averages)
    differences = torch._foreach_sub(list(values), averages)
    torch._foreach_mul_(differences, share)
    torch._foreach_add_(averages, differences)
