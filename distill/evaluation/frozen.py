"""What a student's frozen features tell of the classes: votes of neighbours, a linear probe, and their spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data import Dataset, Split
from distill.errors import InputError
from distill.evaluation.knn import knn_votes
from distill.evaluation.linear import fit_probe
from distill.launching.processes import on_main
from distill.recipe.evaluation import Evaluation, NearestNeighbours
from distill.report.metrics import measure
from distill.students import Student

LEAST_SHARE = 1e-6
"""Of a class without votes: the logarithm of 0 is no number."""
Run = Callable[[Callable[[Tensor], Sequence[Tensor]], Split], list[Tensor]]
"""Outputs [N, ...] of a forward pass on all images of a split, in file order."""


class Bank(NamedTuple):
    """Features of the M labelled training images, unaugmented."""

    features: Tensor
    """float32 [M, D] on the CPU."""
    labels: Tensor
    """int64 [M]."""
    indices: Tensor
    """int64 [M], their positions in the training split."""


class Found(NamedTuple):
    """What the features of a split's N images tell."""

    values: dict[str, float]
    """By name, as in `metrics.jsonl`."""
    votes: Tensor | None
    """float32 [N, classes]: the logarithm of each class's share of the votes, at least that of `LEAST_SHARE`."""
    features: Tensor
    """float32 [N, D] on the CPU."""
    bank: Bank
    options: NearestNeighbours | None


class FrozenFeatures:
    """Evaluates the features of students on a dataset."""

    def __init__(self, dataset: Dataset, run: Run, options: Evaluation) -> None:
        """
        Raises:
            InputError: there are fewer labelled training images than neighbours.
        """
        self.dataset, self.options, self._run = dataset, options, run
        labels = dataset.labels("train")
        self.labelled = (labels >= 0).nonzero()[:, 0]
        if options.knn is not None and options.knn.k > len(self.labelled):
            raise InputError(
                f"evaluation.knn.k: {options.knn.k} neighbours, but the training split has {len(self.labelled)} images "
                "with labels. Take a smaller k."
            )

    def evaluate(self, student: Student, split: Split) -> Found:
        """Accuracy of the votes in percent (`student/knn`) and the features' spread (`student/spread`). Collective; the
        same on every process.
        """
        features = self._of(student, split)
        bank = Bank(self._of(student, "train")[self.labelled], self._labels("train")[self.labelled], self.labelled)
        values, votes = on_main(lambda: self._measure(features, bank, self._labels(split)))
        return Found(values, votes, features, bank, self.options.knn)

    def test(self, student: Student) -> Found:
        """The same on the test images, and the accuracy of a linear probe in percent (`student/linear`)."""
        found = self.evaluate(student, "test")
        if self.options.linear is None:
            return found
        chosen_on = None
        if self.dataset.info.sizes.get("validation"):
            chosen_on = (self._of(student, "validation"), self._labels("validation"))
        linear = on_main(lambda: self._probe(found, chosen_on))
        return found._replace(values=found.values | {"student/linear": linear})

    def _labels(self, split: Split) -> Tensor:
        return self.dataset.labels(split)

    def _of(self, student: Student, split: Split) -> Tensor:
        student.eval()
        (features,) = self._run(lambda images: [student.embedding(images)], split)
        return features

    def _measure(self, features: Tensor, bank: Bank, labels: Tensor) -> tuple[dict[str, float], Tensor | None]:
        values = {"student/spread": spread(features)}
        if (options := self.options.knn) is None:
            return values, None
        shares = log_shares(features, bank, options, classes=self.dataset.info.num_classes, device=self.dataset.device)
        return {"student/knn": measure(shares.numpy(), labels.numpy()).top1} | values, shares

    def _probe(self, found: Found, chosen_on: tuple[Tensor, Tensor] | None) -> float:
        assert self.options.linear is not None
        device = self.dataset.device
        probe = fit_probe(
            found.bank.features.to(device),
            found.bank.labels.to(device),
            classes=self.dataset.info.num_classes,
            strengths=self.options.linear.strengths,
            validation=None if chosen_on is None else (chosen_on[0].to(device), chosen_on[1].to(device)),
        )
        logits = probe(found.features.to(device)).cpu()
        return measure(logits.numpy(), self._labels("test").numpy()).top1


def log_shares(
    features: Tensor, bank: Bank, options: NearestNeighbours, *, classes: int, device: torch.device
) -> Tensor:
    """`Found.votes` of features [N, D], computed on this device."""
    votes = knn_votes(
        features.to(device),
        bank.features.to(device),
        bank.labels.to(device),
        classes=classes,
        k=options.k,
        temperature=options.temperature,
    ).cpu()
    return (votes / votes.sum(1, keepdim=True)).clamp(min=LEAST_SHARE).log()


def spread(features: Tensor) -> float:
    """1 - |mean of the unit vectors|^2 of features [N, D]: 0 where all have one direction, near 1 where they have none
    in common.
    """
    return 1.0 - float(F.normalize(features.double(), dim=1).mean(0).square().sum())
