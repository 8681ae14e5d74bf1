"""A method on all views of an image, as somebody else's package would bring it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import Method, StepInputs
from distill.options import MethodOptions, Needs
from distill.registry import register


class Options(MethodOptions):
    needs = Needs(logits=True, views="all")
    method: Literal["all_views"] = "all_views"


@register("methods", "all_views", Options)
class AllViews(Method):
    """The student's answer to every view follows the teacher's to the first."""

    def forward(self, step: StepInputs) -> Tensor:
        assert len(step.teacher) == 1
        taught = step.teacher[0].logits["cls"].float().softmax(1)
        return torch.stack([F.cross_entropy(view.logits["dist"].float(), taught) for view in step.student]).mean()
