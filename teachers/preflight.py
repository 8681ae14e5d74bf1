"""Preflight checks of a teacher's accuracy and outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distill.errors import InputError
from teachers.teacher import Teacher

SIGNIFICANT = 0.01
MOST_NAMED = 8
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
    counts, total = _confusion(labels, logits), len(labels)
    accuracy = int(counts.diagonal().sum()) / total
    required = well_above_chance(labels, classes=len(counts)) if min_accuracy is None else min_accuracy
    if accuracy >= required:
        return accuracy
    causes = [
        f"another normalisation or size than in its training (it gets {teacher.contract}; set teacher.mean, std, size)",
        "weights of another model or data set (teacher.weights), or barely trained ones",
    ]
    by_best_order = int(counts[range(len(counts)), _best_order(counts)].sum()) / total
    order = (
        f"its classes in another order than the data's (with renamed classes it would reach {by_best_order:.2%}; "
        "teacher.classes)"
    )
    causes.insert(0 if by_best_order >= max(required, (1 + accuracy) / 2) else 2, order)
    predicted, share = int(counts.sum(0).argmax()), float(counts.sum(0).max()) / total
    if share > 0.9:
        causes.insert(
            0, f"it predicts class {predicted} for {share:.0%} of the images, which means unusable inputs or weights"
        )
    if missing := total - int(counts.sum()):
        causes.insert(0, f"its logits are not numbers on {missing / total:.2%} of the images: damaged weights")
    raise InputError(
        f"teacher {teacher.name}: {accuracy:.2%} accuracy on {total} images, below the required {required:.2%} "
        f"(teacher.min_accuracy{' by default: well above chance' if min_accuracy is None else ''}). "
        f"Likely causes: {'; '.join(f'({n}) {cause}' for n, cause in enumerate(causes, 1))}. "
        "If it really is no better, lower teacher.min_accuracy."
    )


def check_class_order(
    teacher: Teacher, labels: Tensor, logits: Tensor, class_names: Sequence[str], *, key: str = "teacher"
) -> None:
    """Check that the teacher does not answer with one class for another and the reverse, also around a cycle.

    Args:
        labels: int64 [N].
        logits: [N, classes], of the N images.
        class_names: one per class.
        key: of the teacher in the recipe.

    Raises:
        InputError: it does, more often than by chance; the message names the classes and the setting.
    """
    counts = _confusion(labels, logits)
    order, classes = _best_order(counts), len(counts)
    moved: dict[int, int] = {}
    for cycle in _cycles(order):
        exchanged, own = ([int(counts[a, b]) for a, b in pairs] for pairs in (cycle, [(a, a) for a, _ in cycle]))
        if any(a <= b for a, b in zip(exchanged, own, strict=True)):
            continue
        # Over as many comparisons as there are pairs of classes.
        p = stats.binomtest(sum(exchanged), sum(exchanged) + sum(own), alternative="greater").pvalue
        if p * classes * (classes - 1) / 2 < SIGNIFICANT:
            moved |= dict(cycle)
    if not moved:
        return
    outputs = list(range(classes)) if teacher.order is None else teacher.order.tolist()
    of_each = labels.bincount(minlength=classes).tolist()
    seen = [
        f"for '{class_names[a]}' it answers '{class_names[b]}' ({int(counts[a, b])} of {of_each[a]} images)"
        for a, b in moved.items()
    ]
    mapping, kept = (
        json.dumps({class_names[a]: outputs[b] for a, b in pairs}, ensure_ascii=False)
        for pairs in (moved.items(), [(a, a) for a in moved])
    )
    raise InputError(
        f"teacher {teacher.name}: its classes are in another order than the data's: {'; '.join(seen[:MOST_NAMED])}"
        f"{f'; {len(seen)} classes in all' if len(seen) > MOST_NAMED else ''}. Where that is so, set '{key}.classes="
        f"{mapping}', the output for each class; where it really takes them for one another, '{key}.classes={kept}'."
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


def _best_order(counts: Tensor) -> list[int]:
    """The permutation under which most answers are right: a column for each row of the confusion matrix."""
    _, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return [int(column) for column in columns]


def _cycles(order: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """The cycles of a permutation as (index, order[index]), without fixed points."""
    left = {index for index, to in enumerate(order) if index != to}
    while left:
        cycle, at = [], min(left)
        while at in left:
            left.remove(at)
            cycle.append((at, order[at]))
            at = order[at]
        yield cycle


def _confusion(labels: Tensor, logits: Tensor) -> Tensor:
    """Confusion matrix int64 [classes, classes], rows: labels, columns: predictions; without images whose logits are no
    numbers.
    """
    classes, answered = logits.shape[1], logits.amax(1).isfinite()
    answers = (labels * classes + logits.argmax(1))[answered]
    return torch.bincount(answers, minlength=classes**2).view(classes, classes)


def well_above_chance(labels: Tensor, *, classes: int) -> float:
    """The accuracy that `check_accuracy` requires by default, for labels int64 [N]."""
    total = len(labels)
    chance = max(1 / classes, int(labels.bincount().max()) / total)
    noise = math.sqrt(chance * (1 - chance) / total)
    return min(max(2 / classes, chance + 5 * noise), (1 + chance) / 2)
