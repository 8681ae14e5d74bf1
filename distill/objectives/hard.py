"""Hard-label distillation: Touvron et al. 2021, "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), section 4, equation 3."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """CE(student, argmax of the teacher), the mean over samples, in float32.

    Args:
        student_logits, teacher_logits: [B, classes].

    Returns:
        A scalar, 0 or more. No label smoothing: a teacher's decision is taken at its word.
    """
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))
