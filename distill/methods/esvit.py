"""EsViT: Li et al. 2022, "Efficient Self-supervised Vision Transformers for Representation Learning" (arXiv
2106.09785), section 3.2: DINO's loss on views, and the same on the regions of views.

In the published code mixed images keep plain targets in the region part, and a run without local views fails; here
images are not mixed, and local views are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import Shapes, StepInputs
from distill.methods.dino import Dino, Head, entropy, log_answers, soft_targets
from distill.methods.precision import at_least_float32
from distill.options import SelfDistillationOptions
from distill.registry import register


class Options(SelfDistillationOptions):
    method: Literal["esvit"] = Field(
        "esvit",
        description="Views and regions of an image, as the student's moving average sees them (EsViT, Li et al. 2022).",
    )


def region_loss(
    student: Tensor,
    teacher: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    center: Tensor,
    *,
    views: int,
    images: int,
    student_temperature: float = 0.1,
    teacher_temperature: float,
) -> Tensor:
    """The mean over pairs of a global view a and another view b, over the regions i of b and over images, of
    CE(softmax((t_a[j] - c) / T), softmax(s_b[i] / S)), where j is the region of a whose features are most similar to
    those of i, by the cosine; of equally similar ones the first.

    All views of a kind have the same number of regions. Rows are view by view, image by image, region by region.

    Args:
        student: logits [rows, K] of V views, the two global ones first.
        teacher: logits [rows, K] of the global views; no gradient flows into them, nor through the matching.
        student_features, teacher_features: features [rows, E] that are matched.
        center: c, [1, K].
        views, images: V and B.

    Returns:
        A scalar, 0 or more: the region part alone, with weight 1.
    """
    of_global = len(teacher) // (2 * images)
    of_local = (len(student) - len(teacher)) // (max(1, views - 2) * images)
    numbers = [of_global] * 2 + [of_local] * (views - 2)

    def by_image(rows: Tensor, regions: Sequence[int]) -> Tensor:
        parts = rows.split([images * number for number in regions])
        return torch.cat([part.view(images, -1, rows.shape[1]) for part in parts], 1)

    return compare_regions(
        log_answers(by_image(student, numbers), student_temperature),
        soft_targets(by_image(teacher, numbers[:2]), center, teacher_temperature),
        by_image(student_features, numbers),
        by_image(teacher_features, numbers[:2]),
        numbers,
        numbers[:2],
    )[0]


def compare_regions(
    answers: Tensor,
    targets: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    student_regions: Sequence[int],
    teacher_regions: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The loss of `region_loss`, and the mean entropy of its targets, both scalars.

    Args:
        answers: log-probabilities [B, S, K] of the S regions of an image in all views.
        targets: probabilities [B, T, K] of those in the global views.
        student_features, teacher_features: [B, S, E] and [B, T, E].
        student_regions, teacher_regions: numbers of regions by view, with sums S and T.
    """
    views, globals_ = len(student_regions), len(teacher_regions)
    terms = len(answers) * globals_ * (views - 1)
    by_view = (values.split(list(teacher_regions), 1) for values in (teacher_features, targets, entropy(targets)))
    losses, entropies = [], []
    for view, (features, of_view, certain) in enumerate(zip(*by_view, strict=True)):
        nearest = match(student_features, features)
        target = of_view.gather(1, nearest[:, :, None].expand(-1, -1, of_view.shape[2]))
        # Each other view counts the same, whatever its number of regions.
        shares = [1.0 / (number * terms) if other != view else 0.0 for other, number in enumerate(student_regions)]
        share = torch.cat([answers.new_full((n,), share) for n, share in zip(student_regions, shares, strict=True)])
        losses.append(-((target * answers).sum(-1) * share).sum())
        entropies.append((certain.gather(1, nearest) * share).sum())
    return torch.stack(losses).sum(), torch.stack(entropies).sum()


@torch.no_grad()
def match(student: Tensor, teacher: Tensor) -> Tensor:
    """For each region [B, S, E] the index of the most similar one of [B, N, E], by the cosine: int64 [B, S]; the first
    of those that are as similar up to rounding.
    """
    student, teacher = (F.normalize(at_least_float32(features), dim=-1) for features in (student, teacher))
    similarity = student @ teacher.mT
    rounding = 16 * torch.finfo(similarity.dtype).eps
    return (similarity >= similarity.amax(-1, keepdim=True) - rounding).byte().argmax(-1)


@register("methods", "esvit", Options)
class EsVit(Dino):
    """Half of the loss on views, half of that on regions."""

    measured: tuple[str, ...] = ("teacher_entropy", "kl", "region_teacher_entropy", "region_kl")

    def __init__(self, options: SelfDistillationOptions, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        if shapes.region_width is None:
            raise ValueError("esvit compares regions, and this student has no features of regions; use dino")
        self.regions = Head(shapes.region_width, options)

    @property
    def heads(self) -> Sequence[Head]:
        return [self.views, self.regions]

    def forward(self, step: StepInputs) -> Tensor:
        by_view = self.loss_of_views(step)
        by_region, certain = self.loss_of_regions(step)
        self.measurements |= {"region_teacher_entropy": certain, "region_kl": by_region.detach() - certain}
        return (by_view + by_region) / 2

    def loss_of_regions(self, step: StepInputs) -> tuple[Tensor, Tensor]:
        """The loss on regions, and the entropy of its targets."""
        options = cast(SelfDistillationOptions, self.options)
        student = [view.regions for view in step.student if view.regions is not None]
        teacher = [view.regions for view in step.average if view.regions is not None]
        student_features, teacher_features = torch.cat(student, 1), torch.cat(teacher, 1)
        student_logits, teacher_logits = self.regions(student_features, teacher_features, step.epoch, step.autocast)
        return compare_regions(
            log_answers(student_logits, options.student_temperature),
            soft_targets(teacher_logits, self.regions.center, options.teacher_temperature_at(step.epoch)),
            student_features.detach(),
            teacher_features,
            [regions.shape[1] for regions in student],
            [regions.shape[1] for regions in teacher],
        )
