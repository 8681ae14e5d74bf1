"""The Python API: the commands as functions that return values and raise exceptions.

Import it as `distill`: `distill.train`, `distill.evaluate`, ... No function ends the process, and all restore global
state: signal handlers, environment, log handlers, random states and torch's settings.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.errors import InputError
from distill.files.regular import reachable
from distill.launching.signals import stopping
from distill.recipe import Recipe, from_mapping, load, load_teachers_recipe
from distill.registry import load_plugin
from distill.results import Evaluation, Report, Run, Sweep
from distill.scaffold.rules import Goal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from distill.exports.prediction import LoadedStudent
    from distill.inputs import InputContract
    from distill.scaffold.begin import Begun
    from teachers import Teacher

RecipeLike = str | PathLike[str] | Mapping[str, Any] | Recipe
"""The path of a YAML file, the same as plain data, or a validated recipe."""
Head = Literal["fused", "cls", "dist"]

_busy = threading.Lock()


def init(
    folder: str | PathLike[str],
    *,
    teacher: str | PathLike[str] | None = None,
    goal: Goal = "small",
    out: str | PathLike[str] | None = None,
) -> Path:
    """Write a recipe for a folder of images, as `distill init`; returns its path.

    Args:
        folder: with train/CLASS and test/CLASS or val/CLASS, or with CLASS alone.
        teacher: a model as in `teacher.model`, or a file with its weights; None: a second recipe trains one.
        goal: what matters most of the student: few parameters, accuracy, or a short training.
        out: the recipe; by default named after the folder, in the working directory.

    Raises:
        InputError: folder or teacher cannot be used, or a file is in the way; nothing is written then.
    """
    return begin(folder, teacher=teacher, goal=goal, out=out).recipe


@reachable()
def begin(
    folder: str | PathLike[str],
    *,
    teacher: str | PathLike[str] | None = None,
    goal: Goal = "small",
    out: str | PathLike[str] | None = None,
) -> Begun:
    """As `init`, with what there is to say about the recipe."""
    from distill.scaffold.begin import begin as write_recipes

    with stopping(), _alone():
        return write_recipes(
            Path(folder), None if teacher is None else str(teacher), goal, None if out is None else Path(out)
        )


def train(
    recipe: RecipeLike,
    *,
    out: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    data: Any = None,
    teacher: tuple[nn.Module, InputContract] | None = None,
    plugins: Sequence[str | PathLike[str]] = (),
) -> Run:
    """Train the student of a recipe, on all processes of this launch; returns when it is finished.

    On the main thread SIGINT ("interrupt" in a notebook), SIGTERM, SIGUSR1 and SIGHUP end it with a checkpoint. One run
    at a time per process.

    Args:
        recipe: a path, a mapping (whose paths are relative to the working directory), or a `Recipe`.
        out: the run directory; `runs/<name>-<time>` by default.
        resume: 'auto', a run directory or a checkpoint in one, as `--resume`.
        overrides: 'key=value', as on the command line.
        data: in place of the recipe's `data.name`: `{"train": ..., "test": ...}`, perhaps with "validation" and with
            "classes" (their names), or `(train, test)`. Each split is a map-style torch Dataset of (PIL image or uint8
            tensor [C, H, W], label), without random transforms, or a pair of tensors, images uint8 [N, C, H, W] and
            labels int64 [N].
        teacher: in place of the recipe's `teacher.model`: a classifier, normalised images [B, C, size, size] -> logits
            [B, classes], and its `Contract`. The module is copied, not changed.
        plugins: modules or Python files that register variants, as `--plugin`; they stay loaded.

    Raises:
        InputError: an argument cannot be used; nothing half-written is left.
        RunFailed: the run cannot continue.
        Interrupted: stopped early, resumable.
    """
    # Import before signals raise: an interrupted import would leave a module partly imported.
    from distill.given import take
    from distill.pipeline import launch
    from distill.resumption import check_given, resumed_directory

    with stopping(), _alone():
        for plugin in plugins:
            load_plugin(str(plugin))
        given, named = take(data, teacher)
        directory = None if out is None else Path(out)
        resume = None if resume is None else str(resume)
        with reachable():
            # First, since without the given objects the recipe may be invalid.
            check_given(resumed_directory(directory, resume), given)
            resolved, source = _load(recipe, [*overrides, *named])
        return Run(launch(resolved, source=source, out=directory, resume=resume, given=given))


@reachable()
def dry_run(
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    data: Any = None,
    teacher: tuple[nn.Module, InputContract] | None = None,
) -> None:
    """Build everything, run preflight and one step, print sizes and costs; creates no run directory."""
    from distill.dry_run import dry_run as run_once
    from distill.given import take

    with stopping(), _alone():
        given, named = take(data, teacher)
        run_once(_load(recipe, [*overrides, *named])[0], given)


@reachable()
def evaluate(
    target: str | PathLike[str] | RecipeLike | Run,
    *,
    data: Any = None,
    out: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    teacher: tuple[nn.Module, InputContract] | None = None,
) -> Evaluation:
    """Evaluate the student of a run or of an export, and its teacher, or the teacher of a recipe, on a test set.

    A run on its own test set, without `out`: its predictions, its analysis and its report are written again. In all
    other cases nothing of the run changes, and a new folder gets predictions and a report; `distill.compare` takes it
    like a run.

    Args:
        target: a run or its directory, an export folder, a recipe, or a teacher's name.
        data: other data with some or all of the student's classes, by name: a folder of images, DIR/CLASS/* or
            DIR/test/CLASS/*; or as for `train`, where "train" may be missing. None: those that recipe and `overrides`
            name.
        out: the folder for predictions and report; by default that of the run, or a new one under `evaluations`.
        overrides: as for `train`, such as 'data.root=DIR'.
        teacher: as for `train`. On other data, a run whose teacher cannot be had is evaluated without it.

    Returns:
        Metrics by output: `student.fused`, `student.cls`, `student.dist`, `teacher`; accuracies by class; the report.

    Raises:
        InputError: there is nothing to evaluate, a class is none of the student's, or an argument cannot be used.
    """
    with _alone():
        from distill.evaluate_command import evaluate_student, evaluate_teacher
        from distill.given import take

        images = Path(data) if isinstance(data, str | PathLike) else None
        given, named = take(None if images else data, teacher, test_alone=True)
        if isinstance(target, Run) or (isinstance(target, str | PathLike) and Path(target).is_dir()):
            place = None if out is None else Path(out)
            return evaluate_student(Path(target), [*overrides, *named], given, images, place)
        if images or out is not None:
            raise InputError(
                f"{target}: no student of a run or an export. Name a teacher's data as data.name and data.root; "
                "there is no report of a teacher alone."
            )
        recipe = (
            load_teachers_recipe(str(target), [*overrides, *named])
            if isinstance(target, str | PathLike)
            else _load(target, [*overrides, *named])[0]
        )
        return evaluate_teacher(recipe, given)


@reachable()
def sweep(
    target: str | PathLike[str] | Mapping[str, Any],
    *,
    out: str | PathLike[str],
    seeds: int | None = None,
    teachers: Sequence[str | PathLike[str]] | None = None,
    minutes: float | None = None,
    overrides: Sequence[str] = (),
    max_trials: int = 100,
    plugins: Sequence[str | PathLike[str]] = (),
) -> Sweep:
    """Run a recipe under other keys, methods, teachers and seeds, as `distill sweep`; returns when it is finished.

    Trials are runs in processes of their own under `out`/trials, ranked on validation; the best configuration is
    tested, with its control. The same call goes on with a sweep that was stopped or killed. On the main thread SIGINT,
    SIGTERM and SIGHUP stop it, and its trials with a checkpoint.

    Args:
        target: a sweep file, or the same as a mapping, whose `base` is relative to the working directory; with `seeds`
            or `teachers` a recipe file.
        out: the folder of the sweep.
        seeds: the recipe itself, under so many seeds.
        teachers: short pilots of the recipe with each of these teachers, names or recipes of theirs; nothing is tested.
        minutes: training of each pilot; 10 by default.
        overrides: 'key=value', of the recipe.
        max_trials: refuse a sweep of more runs.
        plugins: modules or Python files that register variants, as `--plugin`; they stay loaded.

    Raises:
        InputError: an argument cannot be used, all problems at once; or `out` is in use, or holds another sweep.
        RunFailed: no trial is complete, or the chosen one cannot be finished.
        Interrupted: stopped early; the same call goes on.
    """
    from distill.sweeps.command import planned, run_sweep

    for plugin in plugins:
        load_plugin(str(plugin))
    names = None if teachers is None else [str(teacher) for teacher in teachers]
    run_sweep(
        planned(target, seeds, names, minutes, overrides, max_trials=max_trials, plugins=[str(one) for one in plugins]),
        Path(out),
    )
    return Sweep(out)


@reachable()
def compare(runs: Sequence[str | PathLike[str]], out: str | PathLike[str], *, measure: bool = False) -> Report:
    """Compare teacher, student and control of finished runs in a report; `out` ends in .html.

    Args:
        measure: measure the speeds of all their networks, in turns on this machine; else they are those that each run
            measured at its end.

    Raises:
        InputError: a run is missing, unfinished, damaged or of another test set, `out` is no HTML file, or what is to
            be measured cannot be loaded.
    """
    from distill.report.comparison import compare as compare_runs
    from distill.report.document import check_name, write_report

    check_name(Path(out))
    comparison = compare_runs([Path(run) for run in runs])
    if measure:
        with _alone():
            from distill.measuring import measured_together

            comparison = measured_together(comparison)
    return Report(comparison, write_report(comparison, Path(out)))


@reachable()
def export(
    run: str | PathLike[str],
    to: str | PathLike[str],
    *,
    onnx: bool = False,
    half: bool = False,
    head: Head = "fused",
    license: str = "unknown",
    int8: bool = False,
    max_drop: float = 0.5,
    keep_float: Sequence[str] = (),
) -> Path:
    """Write the student of a run as a timm folder at `to`, which is returned.

    Args:
        onnx: with `model.onnx`: images in [0, 1] -> logits, in float32.
        half: store the weights as float16.
        head: 'cls' or 'dist' keeps only that head.
        license: for the model card, such as 'apache-2.0'.
        int8: with `model.onnx` and `model.int8.onnx`, quantized with training images and measured on the test images.
        max_drop: points of top-1 that int8 may lose; nothing is written if it loses more.
        keep_float: layers that are not quantized, such as 'blocks.5' or 'head'.

    Raises:
        InputError: the run has no export, `to` exists, the student does not support the options, or int8 loses more.
    """
    with _alone():
        from distill.exports.command import export_run
        from distill.exports.int8 import Int8

        quantized = Int8(max_drop, keep_float) if int8 else None
        export_run(Path(run), Path(to), onnx=onnx, half=half, head=head, license=license, int8=quantized)
        return Path(to)


@reachable()
def predict(
    student: str | PathLike[str] | LoadedStudent, images: Sequence[str | PathLike[str] | Image], *, top: int = 5
) -> list[list[tuple[str, float]]]:
    """The most probable classes of each image, with their probabilities, the most probable first.

    Args:
        student: an export folder, or the result of `load_student`.
        images: files or Pillow images.
        top: how many classes, at most.

    Raises:
        InputError: the folder holds no intact export, or a file is no image.
    """
    from distill.exports.prediction import LoadedStudent, most_probable

    return most_probable(student if isinstance(student, LoadedStudent) else load_student(student), images, top)


@reachable()
def load_student(folder: str | PathLike[str]) -> LoadedStudent:
    """The student in a folder written by `distill export` or a run: model, transform and labels.

    Raises:
        InputError: a file is missing, damaged or modified.
    """
    from distill.exports.prediction import load_student as load_folder

    return load_folder(Path(folder))


@reachable()
def load_teacher(spec: str | Mapping[str, Any], num_classes: int, class_names: Sequence[str] | None = None) -> Teacher:
    """A frozen teacher: images in [0, 1], float [B, C, H, W] -> logits [B, num_classes].

    Args:
        spec: the name of a model, or a recipe's `teacher` section.
        class_names: of the data, for logits in their order if the teacher's own order is recorded or in `spec`.

    Raises:
        InputError: `spec` is invalid, model or weights cannot be loaded, or they do not fit `num_classes`.
    """
    import torch

    from distill.launching.isolation import tensors_only
    from teachers import load_teacher as load_spec

    with torch.random.fork_rng(devices=[]), tensors_only():
        return load_spec({"model": spec} if isinstance(spec, str) else spec, num_classes, class_names)


def _load(recipe: RecipeLike, overrides: Sequence[str]) -> tuple[Recipe, Path | None]:
    """The resolved recipe, and its file if it has one."""
    if isinstance(recipe, Recipe):
        return from_mapping(recipe.model_dump(mode="json"), overrides), None
    if isinstance(recipe, Mapping):
        return from_mapping(recipe, overrides), None
    return load(Path(recipe), overrides), Path(recipe)


@contextmanager
def _alone() -> Iterator[None]:
    """Allow one call at a time, and restore global state afterwards."""
    if not _busy.acquire(blocking=False):
        raise InputError(
            "distill: another run, evaluation or export is active in this process. Wait for its end, or use a "
            "separate process."
        )
    try:
        from distill.launching.isolation import isolated

        with isolated():
            yield
    finally:
        _busy.release()
