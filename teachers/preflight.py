"""Preflight checks of a teacher's accuracy and outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.errors import InputError
from teachers.teacher import Teacher

SAME = 1e-5
"""Outputs count as the same up to this difference, relative to the largest output."""


def check_accuracy(teacher: Teacher, labels: Tensor, logits: Tensor, *, min_accuracy: float | None) -> float:
    """The accuracy (0 to 1) of the teacher's `logits`, which has to reach `min_accuracy`; None: well above chance.

    Chance is the fraction of the largest class, or 1 / classes if that is more. Well above is 2 / classes, or five
    standard deviations above chance if that is more, but at most halfway from chance to perfect.

    Args:
        labels: int64 [N].
        logits: [N, classes], of the N images.

    Raises:
        InputError: the teacher is worse; the message names the likely causes.
    """
    counts = _confusion(labels, logits)
    total = int(counts.sum())
    accuracy = int(counts.diagonal().sum()) / total
    required = _well_above_chance(counts) if min_accuracy is None else min_accuracy
    if accuracy >= required:
        return accuracy
    causes = [
        f"another normalisation or size than in its training (it gets {teacher.contract}; set teacher.mean, std, size)",
        "weights of another model or data set (teacher.weights), or barely trained ones",
    ]
    by_best_order = int(counts.amax(0).sum()) / total
    order = f"its classes in another order than the data's (with renamed classes it would reach {by_best_order:.2%})"
    causes.insert(0 if by_best_order >= max(required, (1 + accuracy) / 2) else 2, order)
    predicted, share = int(counts.sum(0).argmax()), float(counts.sum(0).max()) / total
    if share > 0.9:
        causes.insert(
            0, f"it predicts class {predicted} for {share:.0%} of the images, which means unusable inputs or weights"
        )
    raise InputError(
        f"teacher {teacher.name}: {accuracy:.2%} accuracy on {total} images, below the required {required:.2%} "
        f"(teacher.min_accuracy{' by default: well above chance' if min_accuracy is None else ''}). "
        f"Likely causes: {'; '.join(f'({n}) {cause}' for n, cause in enumerate(causes, 1))}. "
        "If it really is no better, lower teacher.min_accuracy."
    )


def check_features(teacher: Teacher, outputs: Tensor) -> None:
    """Check the outputs [N, features] of a teacher without a classifier on N images.

    Raises:
        InputError: they are not finite, or the same for all images; the message names the likely causes.
    """
    share = outputs.isfinite().all(1).float().mean().item()
    difference = (outputs - outputs[0]).abs().max().item()
    if share < 1:
        problem = f"its outputs are not finite on {1 - share:.2%} of {len(outputs)} images"
    elif difference <= SAME * outputs.abs().max().item():
        problem = f"its outputs are the same on all {len(outputs)} images"
    else:
        return
    raise InputError(
        f"teacher {teacher.name}: {problem}. Likely causes: (1) damaged weights or those of another model "
        f"(teacher.weights); (2) inputs that it cannot use (it gets {teacher.contract}; set teacher.mean, std, size)."
    )


def _confusion(labels: Tensor, logits: Tensor) -> Tensor:
    """Confusion matrix int64 [classes, classes], rows: labels, columns: predictions."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def _well_above_chance(counts: Tensor) -> float:
    classes, total = len(counts), int(counts.sum())
    chance = max(1 / classes, int(counts.sum(1).max()) / total)
    noise = math.sqrt(chance * (1 - chance) / total)
    return min(max(2 / classes, chance + 5 * noise), (1 + chance) / 2)
