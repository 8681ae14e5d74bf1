"""How a run ends: the weights it was for, as an export, and from the export the predictions on the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill import checkpoint
from distill.data import Dataset
from distill.errors import InputError, RunFailed
from distill.evaluation import save_predictions
from distill.exports.card import Card, card_of_run, data_name, render
from distill.exports.folder import describe, load_export, write_export
from distill.files.durable import indispensable
from distill.inputs import Preparation
from distill.recipe import Recipe
from distill.run import Run
from distill.students import Student
from distill.training.saving import Progress


@dataclass(frozen=True)
class SelectedWeights:
    """The weights that a run is for: the best on the split that selects, or the last ones where none does."""

    step: int
    weights: str
    """'raw' or 'ema'."""

    @classmethod
    def of(cls, progress: Progress, *, averaged: bool) -> SelectedWeights:
        if progress.best_step is not None:
            return cls(progress.best_step, progress.best_weights)
        return cls(progress.step, "ema" if averaged else "raw")


def export_chosen(
    chosen: SelectedWeights,
    student: Student,
    run: Run,
    *,
    recipe: Recipe,
    dataset: Dataset,
    metadata: Mapping[str, str],
) -> None:
    """Load the chosen weights from their checkpoint into `student` and export it; on the main process.

    Raises:
        RunFailed: the checkpoint is damaged, or there is no room for the export.
    """
    folder = checkpoint.folder_of_step(run.checkpoints, chosen.step)
    try:
        checkpoint.verify(folder)
    except InputError as damage:
        raise RunFailed(f"{damage} A resumed run takes the best of those that are left.") from None
    student.load_state_dict(checkpoint.read_tensors(folder, "model" if chosen.weights == "raw" else "ema"))
    images, _ = next(dataset.evaluation_batches("test", 0, 1, 1))
    student.preparation = Preparation.of(images[0], recipe.data.resolution)
    names = dataset.info.class_names
    readme = render(Card(recipe.name, data_name(recipe.data), names, metadata), student)
    with indispensable(run.export, _size(student)):
        write_export(student, run.export, class_names=names, metadata=metadata, readme=readme)


def describe_export(path: Path) -> None:
    """Let the export of the run at `path` say what the run's files have learnt since: its accuracy on the test set, its
    teacher's and its control's. On the main process.

    Raises:
        InputError: the export is damaged.
        RunFailed: there is no room.
    """
    student, class_names = load_export(path / "export")
    card = card_of_run(path, class_names)
    with indispensable(path / "export", _size(student)):
        describe(path / "export", card.metadata, render(card, student))


def _size(student: Student) -> int:
    return sum(value.nbytes for value in student.model.state_dict().values())


def write_predictions(run: Run, predictions: Mapping[str, Tensor], labels: Tensor, metadata: Mapping[str, str]) -> None:
    """Write the run's `predictions.safetensors`; on the main process.

    Raises:
        RunFailed: there is no room for them.
    """
    with indispensable(run.predictions, sum(values.nbytes for values in (labels, *predictions.values()))):
        save_predictions(run.predictions, predictions, labels, metadata)
