"""Soft distillation: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section
2; with the KL divergence as in Touvron et al. 2021 (arXiv 2012.12877), equation 2."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over samples, in float32.

    The mean is over samples only. DeiT's published code also divides by the number of classes, which is a weight 10
    times smaller on 10 classes and 1000 times on ImageNet.

    Args:
        student_logits, teacher_logits: [B, classes].
        temperature: above 0; larger tells more of what the teacher thinks of the other classes.

    Returns:
        A scalar, 0 or more, and 0 when the two outputs are identical.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
