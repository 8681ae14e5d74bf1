"""Implementation of `distill evaluate`."""

from __future__ import annotations

import copy
import difflib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.table import Table
from torch import Tensor

from distill import run
from distill.analysis import analyse
from distill.console import say
from distill.data import Dataset, Split, open_dataset
from distill.data.folder import EVALUATED, open_test_images
from distill.environment import describe_environment
from distill.errors import InputError
from distill.evaluation import Classification, build_evaluator, described_answers, save_predictions, warn_of_missing
from distill.exports.folder import load_export
from distill.files.safetensors_file import read_safetensors
from distill.files.text import write_text
from distill.given import Given
from distill.launching.processes import on_main, set_threads, start_processes
from distill.pipeline import count_parameters
from distill.recipe import Recipe, from_mapping
from distill.registry import plugins
from distill.report.statistics import wilson
from distill.results import Evaluation, written
from distill.students import Student
from distill.students.saved import CONFIG_FILE, WEIGHTS_FILE
from distill.teaching.earlier import is_trained
from distill.teaching.teachers import build_teacher, check_contracts
from distill.tracking import SHOWN
from distill.validation import missing
from teachers import Teacher

EVALUATIONS = Path("evaluations")
FOLDERS = ("folder", "imagenet")
"""Values of `data.name` whose images are in a folder, `data.root`."""
MOST_NAMES = 5
MOST_CLASSES = 20
"""In a table on the console."""


@dataclass(frozen=True)
class Target:
    """A student that is to be evaluated."""

    path: Path
    """Of a run, or of an export."""
    recipe: Recipe
    """Of the run, with the overrides; of an export that of its data alone."""
    trained_by: Recipe
    """Of the run, with the overrides of its teacher alone; of an export as `recipe`."""
    student: Student
    class_names: Sequence[str]
    is_run: bool

    @property
    def digest(self) -> str | None:
        """Identifies the run's own data."""
        return run.read_status(self.path).get("data_digest") if self.is_run else None


def evaluate_student(
    path: Path, overrides: Sequence[str], given: Given, images: Path | None, out: Path | None
) -> Evaluation:
    """Evaluate the student of a run or an export on a test set. A run's own one, without `out`: its predictions, its
    analysis and its report are written again. Others go to a folder of their own, with a report.

    Args:
        images: a folder of other images, in place of the recipe's data.

    Raises:
        InputError: no student there, or the run is in use, its data or teacher cannot be opened, a class is none of the
            student's, or `out` exists.
    """
    if out is not None and out.exists():
        raise InputError(f"--out {out}: exists already. Choose another folder.")
    target = _target(path, overrides, named=images is not None or given.data is not None)
    accelerator = _accelerator(target.recipe)
    dataset = _dataset(target, given, images, accelerator)
    target.student.to(accelerator.device)
    if out is None and target.is_run and images is None and target.digest in (None, dataset.info.digest):
        return _again(target, given, dataset, accelerator)
    if out is None and target.is_run and images is None:
        say(f"Other data than those of {path}: its own figures and its report stay as they are.")
    return _elsewhere(target, given, dataset, accelerator, out)


def _target(path: Path, overrides: Sequence[str], *, named: bool) -> Target:
    """`named`: whether the data are given beside the overrides."""
    if (path / "resolved.yaml").exists():
        run.check_free(path)
        recipe = from_mapping(run.read_recipe(path).model_dump(), overrides, source=str(path / "resolved.yaml"))
        of_teacher = [text for text in overrides if text.startswith("teacher.")]
        trained_by = from_mapping(run.read_recipe(path).model_dump(), of_teacher, source=str(path / "resolved.yaml"))
        student, names = load_export(path / "export")
        return Target(path, recipe, trained_by, student, names, True)
    if not (path / CONFIG_FILE).exists():
        raise InputError(f"{path}: neither a run (it has no resolved.yaml) nor an export (it has no {CONFIG_FILE}).")
    if not named and not any(text.startswith("data.") for text in overrides):
        raise InputError(
            f"{path}: an export has no data of its own. Give a folder of images, or data such as "
            "data.name=cifar10 data.root=DIR."
        )
    student, names = load_export(path)
    prepared = student.preparation
    data: dict[str, Any] = {"name": "folder", "resolution": student.adapter.contract.size, "validation": 0}
    if prepared is not None:
        data |= {"channels": prepared.channels, "fit": prepared.fit, "background": list(prepared.background)}
    # A student of any size: the recipe is of the data, and perhaps of a teacher.
    raw = {"data": data, "student": {"model": "resnet18"}}
    recipe = from_mapping(raw, overrides, source=str(path))
    return Target(path, recipe, recipe, student, names, False)


def _dataset(target: Target, given: Given, images: Path | None, accelerator: Accelerator) -> Dataset:
    spec, device = target.recipe.data, accelerator.device
    root = Path(spec.root)
    if images is not None:
        if spec.test is not None and spec.name in FOLDERS and images.resolve() == root.resolve():
            raise InputError(
                f"{images}: the run was trained on images of this folder. Leave it out: the images that were held out "
                "are evaluated then."
            )
        spec = spec.model_copy(update={"name": "folder", "root": str(images), "test": None, "validation": 0})
        if (prepared := target.student.preparation) is not None:
            spec = spec.model_copy(update={"channels": prepared.channels})
        return open_test_images(spec, device)
    if spec.name in FOLDERS and spec.test is None and not (target.is_run and (root / "train").is_dir()):
        return open_test_images(spec, device)

    def opened(**changes: Any) -> Dataset:
        options = spec.model_copy(update=changes)
        return open_dataset(options, seed=target.recipe.seed, device=device, given=given.data, unlabelled=False)

    of_one_size = {"fit": "crop", "channels": None}  # nothing is fitted then
    if given.data is not None:
        with suppress(InputError):
            if (dataset := opened()).info.digest == target.digest:  # the run's own
                return dataset
        return opened(**EVALUATED, **(of_one_size if given.data.tensors else {}))
    if target.is_run:
        return opened()
    try:
        return opened()
    except InputError:
        with suppress(InputError):
            return opened(**of_one_size)
        raise


def _again(target: Target, given: Given, dataset: Dataset, accelerator: Accelerator) -> Evaluation:
    """A run on its own test set; what it has recorded of that is written again."""
    path, recipe, student = target.path, target.recipe, target.student
    _check_trained(recipe)
    teacher = build_teacher(recipe, dataset, accelerator, given.teacher)
    evaluator = build_evaluator(recipe, dataset, accelerator)
    splits: list[Split] = [split for split in ("test", "validation") if dataset.info.sizes.get(split)]
    if teacher is not None:
        say(teacher.describe())
        for split in splits if teacher.num_classes else ():
            evaluator.predict_teacher(teacher, split)
    tested = evaluator.test(student)
    validation = evaluator.predict_validation(student)
    labels = dataset.labels("test")

    def write() -> None:
        earlier = path / "predictions.safetensors"
        described = earlier if earlier.exists() else path / "export" / WEIGHTS_FILE
        _, metadata = read_safetensors(described, "pt", advice="Move it away.")
        metadata |= {"data": dataset.info.digest, **described_answers(evaluator)}
        save_predictions(earlier, tested.predictions, labels, metadata)
        analyse(path, student, teacher, dataset, tested.predictions, validation, tested.found)
        # A control's figures are in the report of its student too.
        for folder in (path, path.parent) if path.resolve().name == "control" else (path,):
            if (folder / "report.html").exists() and run.is_finished(folder):
                written([folder], folder / "report.html")

    on_main(write)
    if not student.heads:
        say("The student has no classifier: its answers are the votes of the nearest training images.")
    for key, name in SHOWN.items():
        if tested.found is not None and key in tested.found.values:
            say(f"{name} on the student's features: {tested.found.values[key]:.2f} %")
    report = path / "report.html"
    return _evaluation(tested.predictions, labels, dataset.info.class_names, report if report.exists() else None)


def _elsewhere(
    target: Target, given: Given, dataset: Dataset, accelerator: Accelerator, out: Path | None
) -> Evaluation:
    """On other data of the same classes, or to another folder."""
    student, names, info = target.student, target.class_names, dataset.info
    if not student.heads:
        raise InputError(
            f"{target.path}: this student has no classifier, so on other data it has no accuracy. Train one from its "
            "weights (student.weights)."
        )
    prepared = student.preparation
    if prepared is not None and info.channels not in (1, prepared.channels):
        raise InputError(
            f"data: {info.name} has images of {info.channels} channels, and {target.path} takes {prepared.channels}."
        )
    own = torch.tensor(_indices(info.class_names, names, f"data: {info.name}", str(target.path)))
    labels = own[dataset.labels("test")]
    evaluator = Classification(dataset, accelerator)
    teacher = _teacher_elsewhere(target, given, dataset, accelerator)
    if teacher is not None and teacher.num_classes:
        evaluator.predict_teacher(teacher, "test")
    predictions = evaluator.predict(student, "test")
    place = target.path.resolve()
    folder = out or _new_folder(f"{place.parent.name if place.name == 'export' else place.name}-on-{info.name}")

    def write() -> None:
        counts = count_parameters(student, teacher)
        status = {"state": "finished", "data_digest": info.digest, "parameters": counts}
        environment = describe_environment(
            num_processes=accelerator.num_processes,
            precision="fp32",
            device=accelerator.device,
            threads=torch.get_num_threads(),
        )
        metadata = {"data": info.digest, "class_names": json.dumps(list(names), ensure_ascii=False)}
        try:
            folder.mkdir(parents=True)
            save_predictions(folder / "predictions.safetensors", predictions, labels, metadata)
            write_text(folder / "environment.json", json.dumps(environment, indent=1))
            write_text(folder / "status.json", json.dumps(status, indent=1))
            written([folder], folder / "report.html")
        except OSError as error:
            raise InputError(f"--out {folder}: cannot be written ({error.strerror or error}).") from None

    on_main(write)
    return _evaluation(predictions, labels, names, folder / "report.html")


def _indices(names: Sequence[str], known: Sequence[str], data: str, student: str) -> list[int]:
    """The student's index of each class of the data."""
    place = {name: index for index, name in enumerate(known)}
    if unknown := [name for name in names if name not in place]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise InputError(
            f"{data}: {len(unknown)} of its {len(names)} classes are none of {student}'s: {_some(unknown)}{hint}. It "
            f"knows {_some(known)}. Name the classes alike; some of them may be missing."
        )
    return [place[name] for name in names]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _teacher_elsewhere(target: Target, given: Given, dataset: Dataset, accelerator: Accelerator) -> Teacher | None:
    """The teacher, as for the data that the run was trained on; none where it cannot be had."""
    trained_on = copy.copy(dataset)
    trained_on.info = replace(
        dataset.info, class_names=tuple(target.class_names), digest=target.digest or dataset.info.digest
    )
    try:
        _check_trained(target.trained_by)
        return build_teacher(target.trained_by, trained_on, accelerator, given.teacher)
    except InputError as error:
        say(f"Without the teacher: {error}")
        return None


def _new_folder(name: str) -> Path:
    while (path := EVALUATIONS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").exists():
        time.sleep(0.1)  # another one in this second
    return path


def evaluate_teacher(recipe: Recipe, given: Given) -> Evaluation:
    """Evaluate the teacher of a recipe on the test set of its data.

    Raises:
        InputError: it has none, data or teacher cannot be opened, or its inputs are markedly better prepared otherwise.
    """
    for problem in missing(recipe, plugins=bool(plugins())):
        name = recipe.teachers[0].model if problem.keys[0] == ("teacher", "model") else None
        if name is not None and not timm.is_model(name):  # the caller may have registered it
            raise InputError(f"{name}: no run, export or recipe there; as a teacher, {problem.message}")
    accelerator = _accelerator(recipe)
    _check_trained(recipe)
    dataset = open_dataset(recipe.data, seed=recipe.seed, device=accelerator.device, given=given.data, unlabelled=False)
    teacher = build_teacher(recipe, dataset, accelerator, given.teacher)
    if teacher is None:
        raise InputError(f"{recipe.name}: the recipe has no teacher to evaluate.")
    if not teacher.num_classes:
        raise InputError(f"{recipe.name}: {teacher.name} has no classifier, so it has no accuracy.")
    say(teacher.describe())
    check_contracts(recipe, teacher, dataset, accelerator)
    predictions = {"teacher": Classification(dataset, accelerator).predict_teacher(teacher, "test")}
    return _evaluation(predictions, dataset.labels("test"), dataset.info.class_names, None)


def _accelerator(recipe: Recipe) -> Accelerator:
    start_processes()
    set_threads(recipe.train.threads)
    AcceleratorState._reset_state()  # of a caller in Python, who may train in another precision
    return Accelerator(mixed_precision="no")


def _check_trained(recipe: Recipe) -> None:
    for spec in recipe.teachers:
        if not is_trained(recipe, spec):
            raise InputError(
                f"teacher.recipe: {spec.recipe} is not trained yet. Launch it, or the student's recipe, first."
            )


def _evaluation(
    predictions: Mapping[str, Tensor], labels: Tensor, names: Sequence[str], report: Path | None
) -> Evaluation:
    warn_of_missing(predictions)
    logits = {name: values.numpy() for name, values in predictions.items()}
    return Evaluation(logits, labels.numpy(), names, report)


def tables(found: Evaluation) -> Iterator[Table]:
    """For a console of 80 columns: a line an output, and a line a class."""
    shown = Table("model", box=None, pad_edge=False)
    for name in ("correct", "top-1 %", "95 % interval", "macro %", "top-5 %", "NLL"):
        shown.add_column(name, justify="right")
    for name, metrics in found.items():
        low, high = wilson(metrics.top1_correct, metrics.samples)
        shown.add_row(
            name,
            f"{metrics.top1_correct:,} of {metrics.samples:,}",
            f"{metrics.top1:.2f}",
            f"{low:.1f} to {high:.1f}",
            f"{metrics.macro:.2f}",
            f"{metrics.topk:.2f}",
            f"{metrics.nll:.4f}",
        )
    yield shown
    whole = [name for name in ("student.fused", "teacher") if name in found]
    accuracies = {name: found.by_class(name) for name in whole}
    counts = {name: count for name, count in found.images.items() if count}
    worst = sorted(counts, key=lambda name: accuracies[whole[0]][name] or 0.0)[:MOST_CLASSES]
    some = len(counts) > MOST_CLASSES
    by_class = Table(
        "class",
        box=None,
        pad_edge=False,
        title=f"the worst {MOST_CLASSES} of {len(counts):,} classes" if some else None,
    )
    for name in ("images", *(f"{name} %" for name in whole)):
        by_class.add_column(name, justify="right")
    for name in worst if some else counts:
        by_class.add_row(name, f"{counts[name]:,}", *(f"{accuracies[model][name]:.2f}" for model in whole))
    yield by_class
