"""Base classes of distillation methods, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.features import Features
from distill.methods.maps import pairs_of
from distill.options import MapsOptions, MethodOptions


class StepInputs(NamedTuple):
    """Inputs of methods in a step; labels and metrics refer to view 0."""

    student: Sequence[Features]
    """By view."""
    teacher: Sequence[Features]
    """By view, without gradients; empty without a teacher."""
    targets: Tensor
    """[B, classes], rows summing to 1 (soft where images were mixed), not smoothed; zeros for an image without a label.
    A method that cannot do without says so by `needs.labels`.
    """
    indices: Tensor
    """int64 [B], positions of the samples in the training split."""
    progress: float
    """Fraction of the run that is done, 0 to 1."""
    epoch: float = 0.0
    """Epochs that are done."""
    average: Sequence[Features] = ()
    """Embeddings and regions by the student's moving average, by global view, without gradients (`teacher.ema`)."""
    weights: Tensor | None = None
    """float32 [B]: of a mixed image the mean of its labels' (`data.class_weights`), 1 without a label. None: all 1."""
    autocast: torch.dtype | None = None
    """In which the networks have computed; None: without autocast. Methods are called without."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of student and teacher that methods depend on."""

    student_channels: Sequence[int] = ()
    """Of the student's map after each block or stage."""
    teacher_channels: Mapping[str, int] = field(default_factory=dict)
    """Of the teacher's maps by name."""
    stages: Sequence[str] = ()
    """The teacher's default maps, first to last."""
    num_classes: int = 0
    embedding_width: int = 0
    """Of the student's embedding, for methods that need it."""
    region_width: int | None = None
    """Of the student's regions, likewise; None: it has none."""


class Method(nn.Module):
    """One distillation loss: an unweighted scalar of a step.

    It may have parameters, which are trained along with the student and never exported, and buffers (a queue, a
    centre), which checkpoints keep. Buffers are updated in `after_step`, not in `forward`, and not for skipped steps.
    """

    blocks: tuple[int, ...] = ()
    """Blocks of the student whose maps it needs."""
    maps: tuple[str, ...] = ()
    """Names of the teacher's maps that it needs."""
    measured: tuple[str, ...] = ()
    """Names of its `measurements`, which are logged as METHOD/NAME."""

    def __init__(self, options: MethodOptions, shapes: Shapes) -> None:
        """Raises ValueError for options that do not fit these shapes."""
        super().__init__()
        self.options = options
        self.arguments = options.arguments()
        self.measurements: dict[str, Tensor] = {}
        """Scalars of the last `forward`, without gradients; means over samples."""

    def forward(self, step: StepInputs) -> Tensor:
        """The loss, a scalar in float32 or more, 0 or more."""
        raise NotImplementedError

    def averaged(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Pairs (average, module) of its submodules: `teacher.ema` keeps in the first the second's moving average."""
        return ()

    def after_step(self, step: StepInputs, skipped: Tensor) -> None:
        """Update buffers in place after the optimizer step, unless it was `skipped` (bool [], on the device):
        `buffer.copy_(torch.where(skipped, buffer, new))`. Called for each micro-batch, whose features are kept until
        then.
        """

    def end_step(self, skipped: Tensor) -> None:
        """Likewise, once in a step, from what `forward` has kept; also after the method has ended. Collective."""


class LogitsMethod(Method):
    """Compares the logits of the student's distillation head, else of its only head, with the teacher's.

    With `data.class_weights` the loss is the mean over samples of weight * loss of the sample, which `compare` computes
    for one sample after the other (vectorised by `torch.vmap`); unless it compares samples with each other, which have
    no loss of their own then.
    """

    def forward(self, step: StepInputs) -> Tensor:
        student, teacher = step.student[0].logits, step.teacher[0].logits
        pairs = student.get("dist", student["cls"]), teacher["cls"], step.targets
        if step.weights is None or self.options.needs.compares_samples:
            return self.compare(*pairs)
        losses = torch.vmap(lambda *sample: self.compare(*(tensor[None] for tensor in sample)))(*pairs)
        return (step.weights * losses).mean()

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """[B, classes] each -> a scalar, the mean over samples unless `needs.compares_samples`."""
        raise NotImplementedError


class MapsMethod(Method):
    """The mean over pairs of a student block and a teacher map."""

    def __init__(self, options: MapsOptions, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        given = [(pair.block, pair.map) for pair in options.pairs or ()]
        self.pairs = pairs_of(given, options.pairing, depth=len(shapes.student_channels), maps=shapes.stages)
        self.blocks = tuple(sorted({block for block, _ in self.pairs}))
        self.maps = tuple(dict.fromkeys(name for _, name in self.pairs))

    def channels(self, shapes: Shapes) -> list[tuple[int, int]]:
        """Of the student's and of the teacher's map, by pair."""
        return [(shapes.student_channels[block], shapes.teacher_channels[name]) for block, name in self.pairs]

    def forward(self, step: StepInputs) -> Tensor:
        student, teacher = step.student[0].maps, step.teacher[0].maps
        losses = [self.compare(student[block], teacher[name], pair) for pair, (block, name) in enumerate(self.pairs)]
        return torch.stack(losses).mean()

    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        """[B, C, h, w] and [B, D, H, W] of pair number `pair` -> a scalar."""
        raise NotImplementedError
