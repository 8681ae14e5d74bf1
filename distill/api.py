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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distill.errors import InputError
from distill.files.regular import reachable
from distill.launching.signals import stopping
from distill.recipe import Recipe, from_mapping, load, load_teachers_recipe
from distill.registry import load_plugin
from distill.scaffold.rules import Goal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from distill.exports.prediction import LoadedStudent
    from distill.inputs import InputContract
    from distill.report.comparison import Comparison
    from distill.report.metrics import Metrics
    from distill.scaffold.begin import Begun
    from teachers import Teacher

RecipeLike = str | PathLike[str] | Mapping[str, Any] | Recipe
"""The path of a YAML file, the same as plain data, or a validated recipe."""
Head = Literal["fused", "cls", "dist"]

_busy = threading.Lock()


class Report(NamedTuple):
    """A comparison, and the files that show it: HTML, Markdown, JSON and the curves as SVG."""

    comparison: Comparison
    files: list[Path]


class Run:
    """A run directory, read again at each call, also during the run. Accepted wherever a path is."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """
        Raises:
            InputError: no run has begun there.
        """
        self.path = Path(path)
        with reachable():
            begun = (self.path / "status.json").is_file()
        if not begun:
            raise InputError(f"{self.path}: not a run directory (it has no status.json).")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.status.get('state')}"

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`: `state` ('running', 'finished', 'trained' by a recipe without `train.test`, 'interrupted',
        'failed', or 'killed' if no process was left to write it), `reason`, `step`, `epoch`, the last `metrics`, and
        so on.
        """
        from distill import run

        return run.read_status(self.path) | {"state": run.state_of(self.path)}

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, optionally of one `event` ('train', 'eval', 'preflight', ...)."""
        from distill.files.metrics import read_lines

        return [line for line in read_lines(self.path / "metrics.jsonl") if event in (None, line["event"])]

    def predictions(self) -> dict[str, Tensor]:
        """Test set outputs of a finished run: `labels` int64 [N], and logits float32 [N, classes] of `student.fused`,
        `student.cls`, and, if present, `student.dist` and `teacher`.

        Raises:
            InputError: they are missing or damaged.
        """
        import torch

        from distill.report.metrics import read_predictions

        found = read_predictions(self.path / "predictions.safetensors")
        arrays = {"labels": found.labels, **found.logits}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def student(self) -> LoadedStudent:
        """The exported student, as returned by `load_student`."""
        return load_student(self.path / "export")

    def report(self) -> Report:
        """Teacher, student and control of this finished run side by side, written to `report.html` in its directory."""
        return compare([self], self.path / "report.html")


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
    overrides: Sequence[str] = (),
    data: Any = None,
    teacher: tuple[nn.Module, InputContract] | None = None,
) -> dict[str, Metrics]:
    """Evaluate a run's exported student and its teacher, or the teacher of a recipe, on the test set; rewrites the
    run's predictions and analysis.

    Args:
        target: a run or its directory, a recipe, or a teacher's name.
        overrides, data, teacher: as for `train`.

    Returns:
        Metrics by output: `student.fused`, `student.cls`, `student.dist`, `teacher`.

    Raises:
        InputError: there is nothing to evaluate, or an argument cannot be used.
    """
    with _alone():
        from distill.commands import evaluate_run, evaluate_teacher
        from distill.given import take

        given, named = take(data, teacher)
        if isinstance(target, Run) or (isinstance(target, str | PathLike) and Path(target).is_dir()):
            return evaluate_run(Path(target), [*overrides, *named], given)
        recipe = (
            load_teachers_recipe(str(target), [*overrides, *named])
            if isinstance(target, str | PathLike)
            else _load(target, [*overrides, *named])[0]
        )
        return evaluate_teacher(recipe, given)


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
    import torch

    from distill.exports.prediction import load_student as load_folder

    with torch.random.fork_rng(devices=[]):  # random weights are drawn before they are loaded
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
