"""Soft distillation: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section
2; with the KL divergence as in Touvron et al. 2021 (arXiv 2012.12877), equation 2; and Sun et al. 2024, "Logit
Standardization in Knowledge Distillation" (arXiv 2403.01993), section 4."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import LogitsMethod
from distill.methods.precision import at_least_float32
from distill.options import LogitsOptions, Positive, Weight, weight
from distill.registry import register


class Options(LogitsOptions):
    method: Literal["soft"] = Field(
        "soft", description="KL divergence from the teacher's softened output (Hinton et al. 2015)."
    )
    weight: Weight = weight(0.5)
    temperature: Positive = Field(3.0, description="Softens both outputs; the loss is scaled by its square.")
    standardize: bool = Field(
        False, description="Standardise the logits of each sample first (Sun et al. 2024); weights of 9 suit it."
    )


def soft(student_logits: Tensor, teacher_logits: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over samples, in float32.

    The mean is over samples only. DeiT's published code also divides by the number of classes, which is a weight 10
    times smaller on 10 classes and 1000 times on ImageNet.

    Args:
        student_logits, teacher_logits: [B, classes].
        temperature: above 0; larger values give more weight to the other classes.
        standardize: first replace both logits by (z - mean) / (std + 1e-7), over the classes of a sample, so that the
            student need not match the range of the teacher's logits.

    Returns:
        A scalar, 0 or more, 0 for identical outputs. Invariant to a constant added to a sample's logits, and with
        `standardize` to a positive factor.
    """
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return divergence(log_student, log_teacher).sum() / len(student) * temperature**2


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Terms of KL(teacher || student): those of torch's `kl_div`, for which `torch.vmap` has a loop only."""
    return log_teacher.exp() * (log_teacher - log_student)


def _standardize(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / (logits.std(dim=-1, keepdim=True) + 1e-7)


@register("methods", "soft", Options)
class Soft(LogitsMethod):
    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return soft(student_logits, teacher_logits, **self.arguments)
