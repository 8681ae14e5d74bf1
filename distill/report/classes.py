"""What a model confuses: accuracy by class, confusion matrices, the pairs that are mixed up most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from distill.report.metrics import Floats, Ints

Confusion = NDArray[np.int64]


class Pair(NamedTuple):
    """Images of one class that are taken for another."""

    label: int
    taken_for: int
    images: int


def confusion(logits: Floats, labels: Ints) -> Confusion:
    """int64 [classes, classes]: row the label, column the answer."""
    matrix: Confusion = confusion_matrix(labels, logits.argmax(1), labels=np.arange(logits.shape[1]))
    return matrix


def accuracy_by_class(matrix: Confusion) -> list[float | None]:
    """Percent right of each class; None for a class without test images."""
    return [100 * int(row[index]) / total if (total := int(row.sum())) else None for index, row in enumerate(matrix)]


def most_confused(matrix: Confusion, number: int) -> list[Pair]:
    """The largest counts beside the diagonal, by falling count, then by class; none of 0."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:number]
    pairs = [Pair(int(place) // len(matrix), int(place) % len(matrix), int(mistakes.flat[place])) for place in order]
    return [pair for pair in pairs if pair.images]
