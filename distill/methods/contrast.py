"""Contrastive matching of smoothed maps: Li et al. 2024, "TAS: Distilling Arbitrary Teacher and Student via a Hybrid
Assistant" (arXiv 2410.12342; ICCV 2025 as "Fuse Before Transfer"): its spatial-agnostic InfoNCE loss on features after
average pooling, since CNNs and ViTs differ in where they hold what they know of an image.

Of the paper this is that loss between teacher and student alone: not the assistant of parts of both, nor the loss on
logits. There the last features are compared, here all maps; there the temperature is learned, here it is fixed.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods.base import MapsMethod, Shapes
from distill.methods.precision import at_least_float32, divisor
from distill.options import MapsOptions, Needs, Positive, Weight, WeightSchedule, weight
from distill.registry import register


class Options(MapsOptions):
    needs = Needs(maps=True, compares_samples=True)
    method: Literal["contrast"] = Field(
        "contrast", description="Finding an image's maps among those of the batch, by their means (Li et al. 2024)."
    )
    # The paper's weight, 1. It ends as that of `guide` does: images of one class are told apart here as all others are.
    weight: Weight = weight(WeightSchedule(start=1.0, end=0.0, until=0.7))
    # Means of maps after ReLU are much alike: of a trained ResNet-20 they have cosines of 0.94, 0.91 and 0.59. The
    # best student's loss, of log 128 = 4.9, is 2.4, 1.6 and 0.5; with a temperature of 0.2 it is 3.8, 3.5 and 2.4.
    temperature: Positive = Field(0.07, description="Divides the cosines; smaller values weigh similar images more.")


def contrast(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE: the mean over i of -log softmax_j(cos(student_i, teacher_j) / temperature) at j = i.

    Args:
        student, teacher: [B, C], a vector of each image. One of zeros has a cosine of 0 with all.

    Returns:
        A scalar, 0 or more; log B where all cosines are equal, and 0 in a batch of one. Invariant to positive factors
        on vectors and to the order of samples.
    """
    cosines = _directions(student) @ _directions(teacher.detach()).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(cosines), device=cosines.device))


def _directions(vectors: Tensor) -> Tensor:
    return vectors / divisor(torch.linalg.vector_norm(vectors, dim=1, keepdim=True))


@register("methods", "contrast", Options)
class Contrast(MapsMethod):
    """On spatial means, over the samples of a micro-batch. The student's mean token is projected to the teacher's
    channels, which is the mean of the projected tokens.
    """

    def __init__(self, options: Options, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        self.projections = nn.ModuleList(nn.Linear(*of_pair) for of_pair in self.channels(shapes))

    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        student, teacher = (at_least_float32(maps).mean(dim=(2, 3)) for maps in (student_map, teacher_map))
        return contrast(self.projections[pair](student), teacher, **self.arguments)
