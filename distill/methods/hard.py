"""Hard-label distillation: Touvron et al. 2021, "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), section 4, equation 3."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import LogitsMethod
from distill.options import LogitsOptions, Weight, weight
from distill.registry import register


class Options(LogitsOptions):
    method: Literal["hard"] = Field(
        "hard", description="Cross-entropy with the teacher's decision (Touvron et al. 2021)."
    )
    weight: Weight = weight(0.5)


def hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """CE(student, argmax of the teacher), the mean over samples, in float32.

    Args:
        student_logits, teacher_logits: [B, classes].

    Returns:
        A scalar, 0 or more, without label smoothing.
    """
    loss = F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))
    # A row that is no numbers decides nothing: the loss is NaN, as those on probabilities are, and the step is skipped.
    return loss + 0.0 * teacher_logits.float().amax(dim=-1).sum()


@register("methods", "hard", Options)
class Hard(LogitsMethod):
    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return hard(student_logits, teacher_logits)
