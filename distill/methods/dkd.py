"""Decoupled knowledge distillation: Zhao et al. 2022, "Decoupled Knowledge Distillation" (arXiv 2203.08679), section
3, equation 7."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import LogitsMethod
from distill.methods.precision import at_least_float32
from distill.methods.soft import divergence
from distill.options import LogitsOptions, Needs, NonNegative, Positive, Weight, WeightSchedule, weight
from distill.registry import register


class Options(LogitsOptions):
    needs = Needs(logits=True, labels=True)
    method: Literal["dkd"] = Field("dkd", description="Decoupled distillation (Zhao et al. 2022).")
    weight: Weight = weight(WeightSchedule(start=0.0, end=1.0, until=0.08))
    alpha: NonNegative = Field(1.0, description="Weight of the part on the target class.")
    beta: NonNegative = Field(8.0, description="Weight of the part on the other classes.")
    temperature: Positive = Field(4.0, description="Softens both outputs; the loss is scaled by its square.")


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), the mean over samples, in float32.

    With p = softmax(logits / T) and the label t, TCKD is KL(teacher || student) of the two outcomes (p_t, 1 - p_t),
    and NCKD is that of the other classes among themselves, p_i / (1 - p_t) for i != t. Soft distillation is
    TCKD + (1 - teacher's p_t) NCKD, in which the other classes hardly count if the teacher is confident.

    The loss of a sample with two mixed labels (mixup, cutmix) is the mean of the losses with either label as t,
    weighted by their proportions; the paper has samples of one label only.

    Args:
        student_logits, teacher_logits: [B, classes], two classes or more.
        targets: [B, classes], rows summing to 1, of one label or two, not smoothed. Each image needs a label:
            recipes with unlabelled images (`data.unlabelled`, `data.labelled`) are refused.
        alpha, beta: 0 or more.
        temperature: above 0.

    Returns:
        A scalar, 0 or more, 0 for identical outputs. Invariant to a constant added to a sample's logits.
    """
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()) / temperature
    shares, labels = targets.to(student.dtype).topk(2)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    loss = torch.zeros_like(shares[:, 0])
    for share, label in zip(shares.unbind(dim=1), labels.unbind(dim=1), strict=True):
        tckd, nckd = _decoupled(student, teacher, label)
        loss = loss + share * (alpha * tckd + beta * nckd)
    return loss.mean() * temperature**2


def _decoupled(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, [B] each, with the classes `label` [B] as targets."""
    other = torch.arange(student.shape[1] - 1, device=label.device).expand(len(label), -1)
    other = other + (other >= label[:, None])
    pairs = []
    for logits in (student, teacher):
        others = logits.gather(1, other)
        # p_t is the sigmoid of this margin, so log p_t and log(1 - p_t) are exact even for p_t close to 0 or 1.
        margin = logits.gather(1, label[:, None]) - others.logsumexp(dim=1, keepdim=True)
        pairs.append((F.logsigmoid(torch.cat([margin, -margin], dim=1)), F.log_softmax(others, dim=1)))
    tckd, nckd = (divergence(of_student, of_teacher).sum(dim=1) for of_student, of_teacher in zip(*pairs, strict=True))
    return tckd, nckd


@register("methods", "dkd", Options)
class Dkd(LogitsMethod):
    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return dkd(student_logits, teacher_logits, targets, **self.arguments)
