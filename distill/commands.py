"""Implementation of `distill evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table
from torch import Tensor

from distill import run
from distill.analysis import analyse
from distill.console import say
from distill.data import Dataset, Split, open_dataset
from distill.errors import InputError
from distill.evaluation import Classification, build_evaluator, described_answers, save_predictions, warn_of_missing
from distill.exports.folder import load_export
from distill.files.safetensors_file import read_safetensors
from distill.given import Given
from distill.launching.processes import set_threads, start_processes
from distill.recipe import Recipe, from_mapping
from distill.report.metrics import Metrics, measure
from distill.students.saved import WEIGHTS_FILE
from distill.teaching.earlier import is_trained
from distill.teaching.teachers import build_teacher, check_contracts
from distill.tracking import SHOWN
from teachers import Teacher


def evaluate_run(path: Path, overrides: Sequence[str], given: Given) -> dict[str, Metrics]:
    """Evaluate a run's export, and its teacher, on the test set, and rewrite its predictions.

    Raises:
        InputError: no run there, or it is in use or has no export, or its data or teacher cannot be opened.
    """
    run.check_free(path)
    recipe = from_mapping(run.read_recipe(path).model_dump(), overrides, source=str(path / "resolved.yaml"))
    student, _ = load_export(path / "export")
    accelerator, dataset, teacher = _set_up(recipe, given)
    student.to(accelerator.device)
    evaluator = build_evaluator(recipe, dataset, accelerator)
    splits: list[Split] = [split for split in ("test", "validation") if dataset.info.sizes.get(split)]
    if teacher is not None:
        say(teacher.describe())
        for split in splits if teacher.num_classes else ():
            evaluator.predict_teacher(teacher, split)
    tested = evaluator.test(student)
    validation = evaluator.predict_validation(student)
    labels = dataset.labels("test")
    earlier = path / "predictions.safetensors"
    described = earlier if earlier.exists() else path / "export" / WEIGHTS_FILE
    _, metadata = read_safetensors(described, "pt", advice="Move it away.")
    metadata |= {"data": dataset.info.digest, **described_answers(evaluator)}
    save_predictions(earlier, tested.predictions, labels, metadata)
    analyse(path, student, teacher, dataset, tested.predictions, validation, tested.found)
    if not student.heads:
        say("The student has no classifier: its answers are the votes of the nearest training images.")
    for key, name in SHOWN.items():
        if tested.found is not None and key in tested.found.values:
            say(f"{name} on the student's features: {tested.found.values[key]:.2f} %")
    return _measured(tested.predictions, labels)


def evaluate_teacher(recipe: Recipe, given: Given) -> dict[str, Metrics]:
    """Evaluate the teacher of a recipe on the test set of its data.

    Raises:
        InputError: it has none, data or teacher cannot be opened, or its inputs are markedly better prepared otherwise.
    """
    accelerator, dataset, teacher = _set_up(recipe, given)
    if teacher is None:
        raise InputError(f"{recipe.name}: the recipe has no teacher to evaluate.")
    if not teacher.num_classes:
        raise InputError(f"{recipe.name}: {teacher.name} has no classifier, so it has no accuracy.")
    say(teacher.describe())
    check_contracts(recipe, teacher, dataset, accelerator)
    return _measured(
        {"teacher": Classification(dataset, accelerator).predict_teacher(teacher, "test")}, dataset.labels("test")
    )


def _set_up(recipe: Recipe, given: Given) -> tuple[Accelerator, Dataset, Teacher | None]:
    start_processes()
    for spec in recipe.teachers:
        if not is_trained(recipe, spec):
            raise InputError(
                f"teacher.recipe: {spec.recipe} is not trained yet. Launch it, or the student's recipe, first."
            )
    set_threads(recipe.train.threads)
    accelerator = Accelerator(mixed_precision="no")
    dataset = open_dataset(recipe.data, seed=recipe.seed, device=accelerator.device, given=given.data, unlabelled=False)
    return accelerator, dataset, build_teacher(recipe, dataset, accelerator, given.teacher)


def _measured(predictions: Mapping[str, Tensor], labels: Tensor) -> dict[str, Metrics]:
    warn_of_missing(predictions)
    return {name: measure(logits.numpy(), labels.numpy()) for name, logits in predictions.items()}


def table(measured: Mapping[str, Metrics]) -> Table:
    """A table for the console."""
    shown = Table("model", "correct", "top-1 %", "macro %", "top-5 %", "NLL")
    for name, metrics in measured.items():
        shown.add_row(
            name,
            f"{metrics.top1_correct:,} of {metrics.samples:,}",
            f"{metrics.top1:.2f}",
            f"{metrics.macro:.2f}",
            f"{metrics.topk:.2f}",
            f"{metrics.nll:.4f}",
        )
    return shown
