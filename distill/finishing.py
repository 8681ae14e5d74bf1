"""How a run ends: the weights it was for, as an export, and from the export the predictions on the test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distill import checkpoint
from distill.durable import indispensable
from distill.errors import InputError, RunFailed
from distill.evaluate import save_predictions
from distill.export import write_export
from distill.run import Run
from distill.saving import Progress
from distill.students import Student
from distill.text_files import markdown


@dataclass(frozen=True)
class Chosen:
    """The weights that a run is for: the best on the split that selects, or the last ones where none does."""

    step: int
    weights: str
    """'raw' or 'ema'."""

    @classmethod
    def of(cls, progress: Progress, *, averaged: bool) -> Chosen:
        if progress.best_step is not None:
            return cls(progress.best_step, progress.best_weights)
        return cls(progress.step, "ema" if averaged else "raw")


def export_chosen(
    chosen: Chosen, student: Student, run: Run, *, class_names: Sequence[str], metadata: Mapping[str, str]
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
    card = "\n".join(f"- {markdown(key)}: {markdown(value)}" for key, value in metadata.items())
    with indispensable(run.export, sum(value.nbytes for value in student.model.state_dict().values())):
        write_export(student, run.export, class_names=class_names, metadata=metadata, card=card)


def write_predictions(run: Run, predictions: Mapping[str, Tensor], labels: Tensor, metadata: Mapping[str, str]) -> None:
    """Write the run's `predictions.safetensors`; on the main process.

    Raises:
        RunFailed: there is no room for them.
    """
    with indispensable(run.predictions, sum(values.nbytes for values in (labels, *predictions.values()))):
        save_predictions(run.predictions, predictions, labels, metadata)
