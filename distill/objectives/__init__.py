"""What a student learns from: the labels and, by weighted objectives, a teacher.

One distillation method a file: the function `name` in `name.py`, called as name(student_logits, teacher_logits,
**options) with the options of its section in a recipe. Nothing else needs to know of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from distill.recipe.schema import Objective
    from distill.students import Heads

__all__ = ["training_loss"]


def training_loss(
    heads: Heads,
    targets: Tensor,
    teacher_logits: Tensor | None,
    *,
    label_weight: float,
    objectives: Sequence[Objective],
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """label_weight * label + sum of weight * objective (Touvron et al. 2021, arXiv 2012.12877, equations 2 and 3 with
    free weights).

    The labels are learned by the class head and the teacher by the distillation head; a model with one head learns
    both on it. Without objectives two heads learn the labels, each with half the weight.

    Args:
        heads: logits [B, classes] per head.
        targets: [B, classes], rows summing to 1 (soft where images were mixed), not smoothed.
        teacher_logits: [B, classes]; None only where there are no objectives.
        objectives: sections of a recipe, each with `method`, `weight` and the method's own options.
        label_smoothing: of the targets, in the label loss only.

    Returns:
        The loss, and its parts, detached and unweighted, under 'label' and each objective's method.
    """
    label = _label_loss(heads.cls, targets, label_smoothing)
    if heads.dist is not None and not objectives:
        label = (label + _label_loss(heads.dist, targets, label_smoothing)) / 2
    loss = label_weight * label
    parts = {"label": label.detach()}
    for objective in objectives:
        assert teacher_logits is not None, "a distillation objective needs the teacher's logits"
        options = objective.model_dump(exclude={"method", "weight"})
        learner = heads.cls if heads.dist is None else heads.dist
        part = _method(objective.method)(learner, teacher_logits, **options)
        loss = loss + objective.weight * part
        parts[objective.method] = part.detach()
    return loss, parts


def _label_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets.float(), label_smoothing=label_smoothing)


@cache
def _method(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(importlib.import_module(f"distill.objectives.{name}"), name)
    return function
