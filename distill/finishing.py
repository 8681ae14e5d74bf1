"""The end of a run: export of the selected weights, predictions and analysis, check of the control, and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill import checkpoint
from distill.analysis import analyse
from distill.console import busy
from distill.data import Dataset
from distill.errors import InputError, RunFailed
from distill.evaluation import described_answers, save_predictions
from distill.exports.card import Card, card_of_run, data_name, render
from distill.exports.folder import describe, load_export, write_export
from distill.files.durable import indispensable
from distill.files.metrics import read_lines
from distill.inputs import Preparation
from distill.launching.processes import on_main
from distill.recipe import Recipe
from distill.recipe.images import rgb
from distill.report.collapse import collapse
from distill.run import Run, read_metrics, read_status
from distill.students import Student
from distill.tracking import Tracking
from distill.trainer import Trainer
from distill.training.saving import Progress

_log = logging.getLogger("distill")


@dataclass(frozen=True)
class SelectedWeights:
    """The weights to export: the best on the selection split, or the last ones without such a split."""

    step: int
    weights: str
    """'raw' or 'ema'."""

    @classmethod
    def of(cls, progress: Progress, *, averaged: bool) -> SelectedWeights:
        if progress.best_step is not None:
            return cls(progress.best_step, progress.best_weights)
        return cls(progress.step, "ema" if averaged else "raw")


def finish(trainer: Trainer, tracking: Tracking, metadata: Mapping[str, str], analysis: str | None) -> None:
    """Export the selected weights, and evaluate the export on the test set, once.

    Args:
        analysis: what the console calls the analysis for the report; None: there is none.

    Raises:
        RunFailed: the checkpoint of the selected weights is damaged, or there is no disk space.
    """
    run, dataset, evaluator, teacher = tracking.run, trainer.dataset, trainer.evaluator, trainer.teacher
    selected = SelectedWeights.of(trainer.progress, averaged=trainer.averaged is not None)
    described = dict(metadata) | {"step": str(selected.step), "weights": selected.weights}
    if trainer.selection_split is not None:
        value = evaluator.primary.removeprefix("student/")
        described[f"{trainer.selection_split}_{value}"] = f"{trainer.progress.best_top1:.2f}"
    with busy("export"):
        on_main(
            lambda: export_selected(
                selected, trainer.student, run, recipe=trainer.recipe, dataset=dataset, metadata=described
            )
        )
    student, _ = load_export(run.export)
    student.to(trainer.accelerator.device)
    if teacher is not None and teacher.num_classes:
        evaluator.predict_teacher(teacher, "test")
    tested, labels = evaluator.test(student), dataset.labels("test")
    origin = {"data": dataset.info.digest, **described, **described_answers(evaluator)}
    on_main(lambda: write_predictions(run, tested.predictions, labels, origin))
    on_main(lambda: describe_export(run.path))
    run.status(exported=asdict(selected), seconds=trainer.seconds)
    epoch = selected.step / trainer.steps_per_epoch
    tracking.test(selected.step, epoch, selected.weights, tested.values)
    if run.is_main and (problem := collapse(trainer.recipe.model_dump(), read_lines(run.metrics.path))) is not None:
        _log.warning("%s", problem)
    if analysis is not None:
        began = time.perf_counter()
        validation = evaluator.predict_validation(student)
        on_main(
            lambda: analyse(
                run.path, student, teacher, dataset, tested.predictions, validation, tested.found, stage=analysis
            )
        )
        run.status(seconds=trainer.seconds | {"analysis": round(time.perf_counter() - began, 2)})


def export_selected(
    selected: SelectedWeights,
    student: Student,
    run: Run,
    *,
    recipe: Recipe,
    dataset: Dataset,
    metadata: Mapping[str, str],
) -> None:
    """Load the selected weights from their checkpoint into `student` and export it; on the main process.

    Raises:
        RunFailed: the checkpoint is damaged, or there is no disk space.
    """
    folder = checkpoint.folder_of_step(run.checkpoints, selected.step)
    try:
        checkpoint.verify(folder)
    except InputError as damage:
        raise RunFailed(f"{damage} A resumed run uses the best of the remaining ones.") from None
    student.load_state_dict(checkpoint.read_tensors(folder, "model" if selected.weights == "raw" else "ema"))
    images, _ = next(dataset.evaluation_batches("test", 0, 1, 1))
    data = recipe.data
    student.preparation = Preparation.of(images[0], data.resolution, rgb(data.background), data.fit)
    names = dataset.info.class_names
    readme = render(Card(recipe.name, data_name(recipe.data), names if student.heads else (), metadata), student)
    with indispensable(run.export, _size(student)):
        write_export(student, run.export, class_names=names, metadata=metadata, readme=readme)


def describe_export(path: Path) -> None:
    """Update the export's model card with the test accuracies of student, teacher and control; on the main process.

    Raises:
        InputError: the export is damaged.
        RunFailed: there is no disk space.
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
        RunFailed: there is no disk space.
    """
    with indispensable(run.predictions, sum(values.nbytes for values in (labels, *predictions.values()))):
        save_predictions(run.predictions, predictions, labels, metadata)


def check_control(student: Path, tracking: Tracking) -> None:
    """Compare initial weights and batches of student and control. Collective.

    Raises:
        RunFailed: the control differs in more than the teacher.
    """

    def compare_them() -> dict[str, Any]:
        paths = (student, student / "control")
        starts = {line["initial_weights"] for path in paths for line in read_metrics(path, "start")}
        seen = [{line["step"]: line for line in read_metrics(path, "epoch")} for path in paths]
        equal = [step for step, line in seen[0].items() if seen[1].get(step, {}).get("batch") == line["batch"]]
        # Batches of the control have labelled images only, so that it goes around them faster.
        compared = [0] if (read_status(student).get("training_images") or {}).get("unlabelled") else [*seen[0]]
        # Devices round augmented pixels differently.
        compared = [step for step in compared if seen[0][step].get("device") == seen[1].get(step, {}).get("device")]
        if len(starts) != 1 or seen[0].keys() != seen[1].keys() or not {*compared} <= {*equal}:
            what = "began from different weights" if len(starts) != 1 else "saw different batches"
            raise RunFailed(f"student and control {what}: the control would differ in more than the teacher.")
        return {
            "step": max(seen[0], default=0),
            "epoch": len(seen[0]),
            "initial_weights": starts.pop(),
            "equal_batches": len(equal),
        }

    tracking.run.log("control", **on_main(compare_them))


def report_on(directory: Path) -> None:
    """Write the report of a finished run; a failure is a warning."""
    # Plots take half a second to import, which should not delay the first step.
    from distill.report.comparison import compare
    from distill.report.document import write_report

    report = directory / "report.html"
    try:
        write_report(compare([directory]), report)
    except OSError as error:
        reason = error.strerror or error
        _log.warning("%s: cannot be written: %s. The run is finished; write it with distill compare.", report, reason)
