"""Similarity-preserving distillation: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation" (arXiv
1907.09682), section 3."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.methods.base import MapsMethod
from distill.methods.precision import at_least_float32, divisor
from distill.options import MapsOptions, Needs, Weight, weight
from distill.registry import register


class Options(MapsOptions):
    needs = Needs(maps=True, compares_samples=True)
    pairing = "last"
    method: Literal["similarity"] = Field(
        "similarity", description="Similarities between samples, of the last maps (Tung and Mori 2019)."
    )
    weight: Weight = weight(3000.0)


def similarity(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """|G_student - G_teacher|^2 / B^2 (Frobenius), in float32, where G [B, B] is Q Q^T of the flattened maps Q
    [B, C h w], each row divided by its L2 norm.

    Args:
        student_map: [B, C, h, w].
        teacher_map: [B, any number of channels, any size].

    Returns:
        A scalar from 0 to 4 / B; 0 for equal similarities, and in a batch of one. Invariant to a factor on all maps
        and to the order of samples.
    """
    return (_gram(student_map) - _gram(teacher_map.detach())).square().mean()


def _gram(maps: Tensor) -> Tensor:
    flat = at_least_float32(maps).flatten(1)
    gram = flat @ flat.T
    return gram / divisor(torch.linalg.vector_norm(gram, dim=1, keepdim=True))


@register("methods", "similarity", Options)
class Similarity(MapsMethod):
    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        return similarity(student_map, teacher_map, **self.arguments)
