"""Evaluators: what is measured of a student after an epoch, and once on the test images."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from distill.data import Dataset, Split
from distill.evaluation.accuracy import accuracies, named_heads, warn_of_missing
from distill.evaluation.frozen import Found, FrozenFeatures
from distill.evaluation.prediction import SMALLEST_BATCH, predict
from distill.recipe import Recipe
from distill.recipe.evaluation import Evaluation
from distill.report.metrics import measure
from distill.students import Student
from teachers import Teacher


class Tested(NamedTuple):
    """What was measured on the test images."""

    predictions: dict[str, Tensor]
    """Logits [N, classes] by output, as in `predictions.safetensors`."""
    values: dict[str, float]
    """By name, as in `metrics.jsonl`."""
    found: Found | None = None
    """What the student's features tell, where that is asked for."""


class Evaluator(ABC):
    """Evaluates a student on a split, on all processes together."""

    primary: str
    """Name of the value by which checkpoints are selected; higher is better."""

    def __init__(self, dataset: Dataset, accelerator: Accelerator, *, batch_size: int = SMALLEST_BATCH) -> None:
        """`batch_size`: images at a time on each process."""
        self.dataset, self.accelerator, self.batch_size = dataset, accelerator, max(SMALLEST_BATCH, batch_size)
        self.teacher_logits: dict[Split, Tensor] = {}
        """[N, classes] by split, for the agreement."""

    def predict_teacher(self, teacher: Teacher, split: Split) -> Tensor:
        """The teacher's logits [N, classes] on a split, stored for the agreement."""
        (self.teacher_logits[split],) = self._run(lambda images: [teacher(images)], split)
        return self.teacher_logits[split]

    @abstractmethod
    def __call__(self, student: Student, split: Split) -> dict[str, float]:
        """Values by name, the same on every process. Leaves the student in eval mode."""

    def predict_validation(self, student: Student) -> dict[str, Tensor]:
        """Logits [N, classes] by output on the validation split; empty without one, or without a classifier."""
        return {}

    @abstractmethod
    def test(self, student: Student) -> Tested:
        """Everything that is measured on the test images at the end of a run."""

    def _run(self, forward: Callable[[Tensor], Sequence[Tensor]], split: Split) -> list[Tensor]:
        return predict(forward, self.dataset, split, self.accelerator, batch_size=self.batch_size)

    def _with_teacher(self, outputs: dict[str, Tensor], split: Split) -> dict[str, Tensor]:
        return outputs | ({"teacher": self.teacher_logits[split]} if split in self.teacher_logits else {})


class Classification(Evaluator):
    """Accuracies in percent of each head and of their mean, and agreement with the teacher; on request also what the
    student's features tell by themselves.
    """

    def __init__(
        self,
        dataset: Dataset,
        accelerator: Accelerator,
        *,
        batch_size: int = SMALLEST_BATCH,
        options: Evaluation | None = None,
        select: Literal["top1", "macro"] = "top1",
    ) -> None:
        """
        Raises:
            InputError: there are fewer labelled training images than neighbours are asked for.
        """
        super().__init__(dataset, accelerator, batch_size=batch_size)
        self.primary = f"student/{select}"
        wanted = options is not None and (options.knn or options.linear)
        self.frozen = FrozenFeatures(dataset, self._run, options) if options is not None and wanted else None

    def predict(self, student: Student, split: Split) -> dict[str, Tensor]:
        """The student's logits on a split, as `named_heads`, and `teacher` if predicted before."""
        student.eval()
        outputs = self._run(lambda images: list(student.logits(images).values()), split)
        return self._with_teacher(named_heads(dict(zip(student.heads, outputs, strict=True))), split)

    def predict_validation(self, student: Student) -> dict[str, Tensor]:
        return self.predict(student, "validation") if self.dataset.info.sizes.get("validation") else {}

    def __call__(self, student: Student, split: Split) -> dict[str, float]:
        values = accuracies(self.predict(student, split), self.dataset.labels(split))
        if self.frozen is not None and self.frozen.options.knn is not None:
            values |= self.frozen.evaluate(student, split).values
        return values

    def test(self, student: Student) -> Tested:
        predictions = self.predict(student, "test")
        values = accuracies(predictions, self.dataset.labels("test"))
        if self.frozen is None:
            return Tested(predictions, values)
        found = self.frozen.test(student)
        return Tested(predictions, values | found.values, found)


class LabelFree(Evaluator):
    """Accuracies in percent of the nearest training images and, on the test images, of a linear probe: of a student
    without a classifier.
    """

    primary = "student/knn"

    def __init__(
        self, dataset: Dataset, accelerator: Accelerator, options: Evaluation, *, batch_size: int = SMALLEST_BATCH
    ) -> None:
        """
        Raises:
            InputError: there are fewer labelled training images than neighbours.
        """
        super().__init__(dataset, accelerator, batch_size=batch_size)
        self.frozen = FrozenFeatures(dataset, self._run, options)

    def __call__(self, student: Student, split: Split) -> dict[str, float]:
        return self.frozen.evaluate(student, split).values

    def test(self, student: Student) -> Tested:
        """The predictions are the votes of the nearest training images: the logarithm of each class's share."""
        found = self.frozen.test(student)
        assert found.votes is not None, "a run without labels has neighbours"
        predictions = self._with_teacher({"student.fused": found.votes}, "test")
        warn_of_missing(predictions)
        values = found.values
        if "teacher" in predictions:
            teacher = measure(predictions["teacher"].numpy(), self.dataset.labels("test").numpy())
            values = values | {"teacher/top1": teacher.top1}
        return Tested(predictions, values, found)


def described_answers(evaluator: Evaluator) -> dict[str, str]:
    """For the metadata of `predictions.safetensors`: what they are, and of which classes, if no classifier's."""
    if not isinstance(evaluator, LabelFree):
        return {}
    return {"answers": "knn", "class_names": json.dumps(evaluator.dataset.info.class_names, ensure_ascii=False)}


def build_evaluator(
    recipe: Recipe, dataset: Dataset, accelerator: Accelerator, *, batch_size: int = SMALLEST_BATCH
) -> Evaluator:
    """The evaluator of a recipe's runs.

    Raises:
        InputError: the data do not have what it needs.
    """
    if recipe.label_free:
        return LabelFree(dataset, accelerator, recipe.evaluation, batch_size=batch_size)
    return Classification(
        dataset, accelerator, batch_size=batch_size, options=recipe.evaluation, select=recipe.train.select
    )
