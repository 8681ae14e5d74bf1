"""Relational knowledge distillation: Park et al. 2019, "Relational Knowledge Distillation" (arXiv 1904.05068),
section 3.2."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import MapsMethod
from distill.methods.precision import at_least_float32, divisor
from distill.options import MapsOptions, Needs, NonNegative
from distill.registry import register


class Options(MapsOptions):
    needs = Needs(maps=True, compares_samples=True)
    pairing = "last"
    method: Literal["relational"] = Field(
        "relational", description="Distances and angles between samples, of the last maps (Park et al. 2019)."
    )
    distance: NonNegative = Field(25.0, description="Weight of the distances.")
    angle: NonNegative = Field(50.0, description="Weight of the angles.")


def relational(student_map: Tensor, teacher_map: Tensor, distance: float, angle: float) -> Tensor:
    """distance * RKD-D + angle * RKD-A, in float32, on embeddings [B, C]: the spatial means of the maps.

    RKD-D is the Huber loss (smooth L1, delta 1) between the student's and the teacher's distances of all pairs of
    samples, [B, B], either divided by their mean over the pairs of two different samples. RKD-A is the Huber loss
    between the cosines of the angles at j in all triples of samples i, j, k, [B, B, B], of memory B^3.

    As in the published code both are means over all entries, also those that are 0 by definition; that mean of
    distances counts samples with identical embeddings. An angle with an identical pair is 0.

    Args:
        student_map: [B, C, h, w].
        teacher_map: [B, any number of channels, any size]; only the embeddings' relations are compared.
        distance, angle: weights, 0 or more.

    Returns:
        A scalar, 0 or more; 0 if the embeddings are equal up to rotation, translation and scale, and in a batch of one.
        Invariant to the order of samples.
    """
    student_distances, student_angles = _relations(student_map)
    teacher_distances, teacher_angles = _relations(teacher_map.detach())
    by_distance = F.smooth_l1_loss(student_distances, teacher_distances)
    by_angle = F.smooth_l1_loss(student_angles, teacher_angles)
    return distance * by_distance + angle * by_angle


def _relations(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, B] and cosines [B, B, B], at the sample of the first dimension."""
    embeddings = at_least_float32(maps).mean(dim=(2, 3))
    batch = len(embeddings)
    differences = embeddings[None] - embeddings[:, None]
    lengths = torch.linalg.vector_norm(differences, dim=2)
    mean = lengths.sum() / max(batch * (batch - 1), 1)
    directions = differences / divisor(lengths)[:, :, None]
    return lengths / divisor(mean), directions @ directions.mT


@register("methods", "relational", Options)
class Relational(MapsMethod):
    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        return relational(student_map, teacher_map, **self.arguments)
