"""DINO: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294),
section 3.1. Without labels: the student predicts, from each of its views of an image, what its own moving average says
of the global views.

The head goes with the student while it trains and is never exported. Its matrices are decayed, its biases are not; with
Muon they belong to AdamW, as do the parameters of all methods: the last layer's rows, whose length does not matter, are
no map between hidden layers, and one optimizer for the whole head keeps the published balance of its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods.base import Method, Shapes, StepInputs
from distill.methods.precision import at_least_float32
from distill.options import SelfDistillationOptions
from distill.registry import register


class Options(SelfDistillationOptions):
    method: Literal["dino"] = Field(
        "dino", description="Views of an image, as the student's moving average sees them (DINO, Caron et al. 2021)."
    )


class DinoHead(nn.Module):
    """Three linear layers with GELU between, a projection to length 1, and a linear layer of rows of length `gain`:
    [..., width] -> [..., prototypes].
    """

    def __init__(
        self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, norm_last_layer: bool = True
    ) -> None:
        """`norm_last_layer`: the gain stays 1."""
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, bottleneck),
        )
        self.last = Prototypes(bottleneck, prototypes, learn_gain=not norm_last_layer)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, freeze_last: bool = False) -> Tensor:
        """Logits; `freeze_last`: the last layer's gradients are 0."""
        x = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
        logits: Tensor = self.last(F.normalize(x, dim=-1), freeze_last)
        return logits


class Prototypes(nn.Module):
    """Products with rows of a learned direction and length: weight normalisation (Salimans and Kingma 2016).

    The published code gives a frozen layer to AdamW without gradients, so that it counts no steps. Here it counts them,
    with gradients of 0, so that its first hundred steps afterwards are up to some four times as long.
    """

    def __init__(self, width: int, prototypes: int, *, learn_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, prototypes, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(prototypes), requires_grad=learn_gain)

    def forward(self, x: Tensor, freeze: bool = False) -> Tensor:
        rows = F.normalize(self.weight, dim=1) * self.gain[:, None]
        if freeze:
            rows = rows.detach() + 0.0 * rows  # gradients of 0, for which DistributedDataParallel waits
        return F.linear(x, rows)


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    views: int,
    student_temperature: float = 0.1,
    teacher_temperature: float,
) -> Tensor:
    """The mean over pairs of a global view a and another view b of CE(softmax((t_a - c) / T), softmax(s_b / S)), itself
    the mean over images; in float32 at least.

    Args:
        student: logits [V * B, K], view by view, the G global ones first.
        teacher: logits [G * B, K]; no gradient flows into them.
        center: c, [1, K].
        views: V, at least 2.

    Returns:
        A scalar, 0 or more.
    """
    return compare_views(
        log_answers(student, student_temperature), soft_targets(teacher, center, teacher_temperature), views
    )


def compare_views(answers: Tensor, targets: Tensor, views: int) -> Tensor:
    """The loss of `dino_loss` of log-probabilities [V * B, K] and probabilities [G * B, K]."""
    batch = len(answers) // views
    answers, targets = (values.view(-1, batch, values.shape[1]) for values in (answers, targets))
    # The sum over all pairs, without those of a view with itself.
    pairs = (targets.sum(0) * answers.sum(0)).sum(-1) - (targets * answers[: len(targets)]).sum((0, 2))
    return -pairs.mean() / (len(targets) * (views - 1))


def log_answers(student: Tensor, temperature: float) -> Tensor:
    """[..., K] -> log-probabilities in float32 at least."""
    return F.log_softmax(at_least_float32(student) / temperature, dim=-1)


def soft_targets(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    """[..., K] -> probabilities in float32 at least, centred and sharpened, without gradients."""
    return F.softmax((at_least_float32(teacher.detach()) - center) / temperature, dim=-1)


def entropy(probabilities: Tensor) -> Tensor:
    """[..., K] -> [...], in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    """momentum * center + (1 - momentum) * the mean of the teacher's logits [N, K] over the rows of all processes:
    [1, K]. Collective.
    """
    mean = at_least_float32(teacher).mean(0, keepdim=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return center * momentum + mean * (1.0 - momentum)


class Head(nn.Module):
    """A `DinoHead` with its moving average and the centre of that one's logits."""

    center: Tensor

    def __init__(self, width: int, options: SelfDistillationOptions) -> None:
        super().__init__()
        self.options = options
        self.head = DinoHead(
            width, options.prototypes, options.hidden, options.bottleneck, norm_last_layer=options.norm_last_layer
        )
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, options.prototypes))
        self._means: list[Tensor] = []
        """Of the teacher's logits in each micro-batch of the current step, [1, K]."""

    def forward(
        self, student: Tensor, teacher: Tensor, epoch: float, autocast: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [..., K] of features of student and teacher."""
        # Networks in half precision have heads in half precision: their products are most of what the method costs.
        # The features themselves may be in float32, as of a layer norm on CUDA.
        with torch.autocast(student.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            student_logits = self.head(student, freeze_last=epoch < self.options.freeze_last_epochs)
            with torch.no_grad():
                teacher_logits = self.average(teacher)
        self._means.append(at_least_float32(teacher_logits).flatten(0, -2).mean(0, keepdim=True))
        return student_logits, teacher_logits

    def end_step(self, skipped: Tensor) -> None:
        """Update the centre with the step's logits; unchanged if `skipped`. Collective."""
        if self._means:
            new = update_center(self.center, torch.cat(self._means), self.options.center_momentum)
            self.center.copy_(torch.where(skipped, self.center, new))
            self._means.clear()


@register("methods", "dino", Options)
class Dino(Method):
    measured: tuple[str, ...] = ("teacher_entropy", "kl")

    def __init__(self, options: SelfDistillationOptions, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        self.views = Head(shapes.embedding_width, options)

    @property
    def heads(self) -> Sequence[Head]:
        return [self.views]

    def forward(self, step: StepInputs) -> Tensor:
        return self.loss_of_views(step)

    def loss_of_views(self, step: StepInputs) -> Tensor:
        """The loss on embeddings."""
        options = cast(SelfDistillationOptions, self.options)
        student, teacher = self.views(
            torch.cat([view.embedding for view in step.student if view.embedding is not None]),
            torch.cat([view.embedding for view in step.average if view.embedding is not None]),
            step.epoch,
            step.autocast,
        )
        targets = soft_targets(teacher, self.views.center, options.teacher_temperature_at(step.epoch))
        loss = compare_views(log_answers(student, options.student_temperature), targets, len(step.student))
        # Each global view has as many partners as any other, so the loss is the entropy plus the divergence.
        certain = entropy(targets).mean()
        self.measurements = {"teacher_entropy": certain, "kl": loss.detach() - certain}
        return loss

    def averaged(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [(head.average, head.head) for head in self.heads]

    def end_step(self, skipped: Tensor) -> None:
        for head in self.heads:
            head.end_step(skipped)
