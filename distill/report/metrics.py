"""Figures from a run's `predictions.safetensors`: exact counts and a float64 mean, on numpy alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.errors import InputError
from distill.files.checksum import CHECKSUM, has_right_checksum
from distill.files.plain_data import parse_json
from distill.files.records import LabelNames, check
from distill.files.safetensors_file import read_safetensors

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

NO_ANSWER = -1
"""The decision of a row of logits that is no numbers."""

OUTPUTS = ("student.fused", "student.cls", "student.dist", "teacher")


@dataclass(frozen=True)
class Predictions:
    """Logits over one test set: `labels` int64 [N], and [N, classes] for each of `OUTPUTS` that the file holds."""

    labels: Ints
    logits: dict[str, Floats]
    by_neighbours: bool = False
    """Whether the student has no classifier: its logits are logarithms of the shares of its neighbours' votes."""
    class_names: tuple[str, ...] = ()
    """Where the file has them: an export without a classifier has none."""

    @property
    def heads(self) -> list[tuple[str | None, str, Floats]]:
        """(head, output, logits) of the student's answers: 'fused', 'cls' and 'dist', None for its only head, or 'knn'
        for the votes of its neighbours.
        """
        if self.by_neighbours:
            return [("knn", "student.fused", self.logits["student.fused"])]
        if "student.dist" not in self.logits:
            return [(None, "student.fused", self.logits["student.fused"])]
        heads = ((name.removeprefix("student."), name) for name in OUTPUTS if name.startswith("student."))
        return [(head, name, self.logits[name]) for head, name in heads if name in self.logits]


class Metrics(NamedTuple):
    """One model's figures over `samples` test images; accuracies are percentages of exact counts."""

    samples: int
    k: int
    """Of top-k: 5, or the number of classes where there are fewer."""
    top1: float
    top1_correct: int
    topk: float
    topk_correct: int
    nll: float
    """Mean negative log-likelihood of the labels in nats."""
    macro: float
    """Macro accuracy: the mean of the accuracies of the classes that have test images (their recalls)."""
    worst_class: float
    """The lowest of them."""
    agreement: float | None = None
    """On which share of the images the decision is the teacher's, right or wrong; None without a teacher."""
    agreements: int | None = None


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a run's .safetensors file.

    Raises:
        InputError: it is missing or cannot be read.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file. Only a run that has been evaluated can be compared.")
    return read_safetensors(path, "np", advice="Write it again with `distill evaluate`.")


def check_whole(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise InputError unless the file is what was written."""
    if not has_right_checksum(path, metadata):
        raise InputError(f"{path}: not what was written (SHA-256 differs). Write it again with `distill evaluate`.")


def read_predictions(path: Path) -> Predictions:
    """Read and check the file that evaluation wrote.

    Raises:
        InputError: it is missing or damaged, its shapes do not fit, or a label is no class.
    """
    tensors, metadata = read_arrays(path)
    # Those that evaluation wrote all have a checksum, and the digest of the data.
    if {CHECKSUM, "data"} & metadata.keys():
        check_whole(path, metadata)
    absent = [name for name in ("labels", "student.fused") if name not in tensors]
    if absent:
        raise InputError(f"{path}: holds no {' and no '.join(absent)}; it is no file of predictions.")
    labels = tensors["labels"]
    logits = {name: tensors[name] for name in OUTPUTS if name in tensors}
    shape = logits["student.fused"].shape
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: labels must be a non-empty row of integers, got {labels.dtype} {list(labels.shape)}."
        )
    for name, values in logits.items():
        if values.shape != shape or len(shape) != 2 or len(values) != len(labels) or not shape[1]:
            raise InputError(
                f"{path}: {name} has shape {list(values.shape)}; expected [{len(labels)}, classes], as all outputs."
            )
        if values.dtype.kind != "f":
            raise InputError(f"{path}: {name} holds {values.dtype} and not floating-point numbers.")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, but there are {shape[1]} classes.")
    names = f'{{"label_names": {metadata.get("class_names", "[]")}}}'
    known = check(LabelNames, parse_json(names, str(path)), str(path)).label_names or []
    return Predictions(labels.astype(np.int64), logits, metadata.get("answers") == "knn", tuple(known))


def are_numbers(logits: Floats) -> NDArray[np.bool_]:
    """[N]: whether each row of logits [N, classes] is an answer: it holds no NaN, no +inf, and not only -inf."""
    numbers: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return numbers


def decisions(logits: Floats) -> Ints:
    """int64 [N]: the class of the largest logit, the lower one of equals; `NO_ANSWER` for a row that is no numbers."""
    return np.where(are_numbers(logits), logits.argmax(axis=1), NO_ANSWER)


def as_numbers(logits: Floats) -> Floats:
    """float64 [N, classes]: the logits, where a row that is no numbers becomes zeros, all classes equally probable."""
    exact = logits.astype(np.float64)
    return np.where(are_numbers(exact)[:, None], exact, 0.0)


def measure(logits: Floats, labels: Ints, teacher: Floats | None = None) -> Metrics:
    """Figures of one model; `logits` and `teacher` are [N, classes], `labels` int64 [N].

    Of equal logits the lower class index comes first, for every count: a constant output decides for class 0. A row
    that is no numbers is a wrong answer that agrees with nothing; in the NLL all classes are equally probable there.
    """
    samples, classes = logits.shape
    k = min(5, classes)
    ranks = np.where(are_numbers(logits), _ranks(logits, labels), classes)
    top1_correct, topk_correct = int((ranks == 0).sum()), int((ranks < k).sum())
    images = np.bincount(labels, minlength=classes)
    present = images > 0
    by_class = np.bincount(labels[ranks == 0], minlength=classes)[present] / images[present]
    agreements = None if teacher is None else int(agree(decisions(logits), decisions(teacher)).sum())
    return Metrics(
        samples=samples,
        k=k,
        top1=100.0 * top1_correct / samples,
        top1_correct=top1_correct,
        topk=100.0 * topk_correct / samples,
        topk_correct=topk_correct,
        nll=mean_nll(logits, labels),
        macro=100.0 * float(by_class.mean()),
        worst_class=100.0 * float(by_class.min()),
        agreement=None if agreements is None else 100.0 * agreements / samples,
        agreements=agreements,
    )


def agree(first: Ints, second: Ints) -> NDArray[np.bool_]:
    """[N]: where two models' decisions are the same answer."""
    same: NDArray[np.bool_] = (first == second) & (first != NO_ANSWER)
    return same


def _ranks(logits: Floats, labels: Ints) -> Ints:
    """[N]: how many classes come before the label, by larger logit, then by lower index."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def mean_nll(logits: Floats, labels: Ints) -> float:
    """Mean negative log-likelihood of the labels in nats, computed in float64 on `as_numbers`."""
    exact = as_numbers(logits)
    shifted = exact - exact.max(axis=1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(shifted).sum(axis=1)) - own).mean())
