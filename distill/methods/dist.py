"""DIST: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536), section 4."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import LogitsMethod
from distill.methods.precision import at_least_float32
from distill.options import LogitsOptions, Needs, NonNegative, Positive
from distill.registry import register


class Options(LogitsOptions):
    needs = Needs(logits=True, compares_samples=True)
    method: Literal["dist"] = Field(
        "dist", description="Correlation with the teacher within samples and within classes (Huang et al. 2022)."
    )
    inter: NonNegative = Field(1.0, description="Weight of the correlation over the classes of a sample.")
    intra: NonNegative = Field(1.0, description="Weight of the correlation over the samples of a class.")
    temperature: Positive = Field(1.0, description="Softens both outputs; the loss is scaled by its square.")


def dist(student_logits: Tensor, teacher_logits: Tensor, inter: float, intra: float, temperature: float) -> Tensor:
    """T^2 (inter * inter-class + intra * intra-class) on softmax(logits / T), [B, classes], in float32.

    Inter-class is 1 - the Pearson correlation of student and teacher over the classes of a sample, the mean over
    samples; intra-class is the same over the samples of a class, the mean over classes. Unlike in soft distillation
    the student need not match the teacher's probabilities, only their proportions.

    As in the published code 1e-8 is added to the product of the norms in a correlation, which becomes 0 without
    variance and too small with very little. In a batch of one the intra-class part is the constant 1, without gradient.

    Args:
        student_logits, teacher_logits: [B, classes].
        inter, intra: weights, 0 or more.
        temperature: above 0.

    Returns:
        A scalar from 0 to 2 T^2 (inter + intra), 0 for identical outputs (unless nearly constant). Invariant to a
        constant added to a sample's logits, and to the order of samples.
    """
    student = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    between_classes = 1 - _correlation(student, teacher).mean()
    within_classes = 1 - _correlation(student.T, teacher.T).mean()
    return (inter * between_classes + intra * within_classes) * temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each row of a with the same of b: [N, M], [N, M] -> [N]."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


@register("methods", "dist", Options)
class Dist(LogitsMethod):
    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return dist(student_logits, teacher_logits, **self.arguments)
