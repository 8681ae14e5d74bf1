"""A run directory, read: the files that a report is made of, and nothing that needs a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import InputError
from distill.files.metrics import read_lines
from distill.files.plain_data import read_json, read_resolved
from distill.files.records import AnalysisValues, Environment, ExportedNetwork, Int8Values, Status, check
from distill.files.records import Record as Checked
from distill.files.regular import check_no_links
from distill.recipe import OPERATIONAL_KEYS, Recipe, from_mapping, known_part
from distill.registry import check_available
from distill.report.metrics import Predictions, check_whole, read_arrays, read_predictions

Record = Mapping[str, Any]
ANALYSIS = "analysis"
ANALYSIS_FORMAT = "1"
INT8, INT8_FORMAT = "int8.json", "1"
"""What the newest int8 export of a run has cost; see distill.exports.int8, which writes it."""
TOKENS = ("class token", "distillation token")
"""Names of the tokens in an analysis that does not give them."""
LARGEST_PICTURE = 1024
"""Of the sides of pictures, in pixels, and of a grid, in patches."""


@dataclass(frozen=True)
class Analysis:
    """What the end of a run computed from its models; see distill.analysis.record, which wrote it."""

    values: Record
    tensors: Mapping[str, NDArray[Any]]

    def validation(self, output: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Logits [N, classes] and labels [N] of an output on the validation split."""
        logits = self.tensors.get(f"validation.{output}")
        return None if logits is None else (logits, self.tensors["validation.labels"])


@dataclass(frozen=True)
class RunFiles:
    """What one finished run left behind; `control` is the run under `control/`, if there is one."""

    path: Path
    predictions: Predictions
    status: Record
    recipe: Record
    """What is known of the resolved one, as plain data: a report on a run of another version is still a report."""
    whole_recipe: bool
    """Whether all of it is known."""
    environment: Record
    """What is known of it; so with all other records."""
    events: tuple[Record, ...]
    """The lines of metrics.jsonl in their order."""
    control: RunFiles | None
    analysis: Analysis | None
    """None for a run of an earlier version."""
    config: Record
    """config.json of the exported student."""
    int8: Record | None
    """None where no int8 file was exported."""

    @property
    def models(self) -> list[tuple[str, RunFiles]]:
        """What was trained: the student and, if there is one, the control."""
        return [("student", self)] + ([] if self.control is None else [("control", self.control)])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class of the logits; their numbers where the run did not record names."""
        classes = next(iter(self.predictions.logits.values())).shape[1]
        for names in (self.config.get("label_names"), self.predictions.class_names):
            if names is not None and len(names) == classes:
                return tuple(names)
        return tuple(map(str, range(classes)))

    def costs(self, model: str) -> Record:
        """Of 'student' or 'teacher', as measured; empty where it was not."""
        costs: Record = {} if self.analysis is None else self.analysis.values["costs"].get(model, {})
        return costs

    @property
    def seconds(self) -> Record:
        """By what the time went to: training, compilation, evaluation, analysis."""
        seconds: Record = self.status.get("seconds", {})
        return seconds

    @property
    def training_seconds(self) -> float | None:
        """Time of the training steps. Where it is not recorded, the time between the lines of the metrics, without the
        pauses before a resumption and the control's own training; None without lines.
        """
        if recorded := self.seconds.get("training"):
            return float(recorded)
        total, before = 0.0, None
        for event in self.events:
            if (now := event.get("time")) is None:
                continue
            if before is not None and event.get("event") not in ("resume", "start", "control"):
                total += max(0.0, now - before)
            before = now
        return total or None

    @cached_property
    def known_recipe(self) -> Recipe | None:
        """The recipe, checked; None where it is of a version that knew other keys."""
        if not self.whole_recipe:
            return None
        try:
            return from_mapping(self.recipe)
        except InputError:
            return None

    @cached_property
    def recipe_digest(self) -> str | None:
        """Identifies what the run trained; None where its recipe is not known."""
        return None if self.known_recipe is None else self.known_recipe.digest(OPERATIONAL_KEYS)

    @cached_property
    def control_digest(self) -> str | None:
        """Identifies the control that this run has or would have; None where it distils nothing, or its recipe is not
        known.
        """
        recipe = self.known_recipe
        if recipe is None or recipe.label_free or not recipe.distill:
            return None
        return recipe.as_control().digest(OPERATIONAL_KEYS)

    @property
    def data_digest(self) -> str | None:
        """Identifies the data; None where the run did not record it."""
        return self.status.get("data_digest")

    @property
    def selected_on_test(self) -> bool:
        return (self.recipe.get("data") or {}).get("select_on") == "test"

    @cached_property
    def tested(self) -> Record:
        """What was measured on the test images at the end, by its name in metrics.jsonl; empty if not recorded."""
        lines = [event for event in self.events if event.get("event") == "eval" and event.get("split") == "test"]
        return lines[-1] if lines else {}

    def parameters(self, model: str) -> int | None:
        """Of 'student' or 'teacher'; None where the run did not record it."""
        return (self.status.get("parameters") or {}).get(model)


def read_run(path: Path) -> RunFiles:
    """Read a finished run.

    Raises:
        InputError: the directory is missing, no run or not finished, a file in it is damaged, or a plugin that it used
            is not loaded; so for its control.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run directory.")
    check_no_links(path / "export", path / "control")
    status = _read(Status, path / "status.json")
    if status is None:
        raise InputError(f"{path}: not a run directory: it has no status.json.")
    state = status.get("state")
    if state != "finished":
        raise InputError(f"{path}: the run is not finished (its state is '{state}'). Resume it, then compare.")
    environment = _read(Environment, path / "environment.json") or {}
    check_available(environment.get("variants", {}), str(path))
    predictions = read_predictions(path / "predictions.safetensors")
    raw = read_resolved(path) or {}
    recipe = known_part(raw)
    return RunFiles(
        path=path,
        predictions=predictions,
        status=status,
        recipe=recipe,
        whole_recipe=recipe == raw,
        environment=environment,
        events=tuple(read_lines(path / "metrics.jsonl", finished=True)),
        control=read_run(path / "control") if (path / "control").is_dir() else None,
        analysis=_read_analysis(path, status.get("data_digest"), predictions),
        config=_read(ExportedNetwork, path / "export" / "config.json") or {},
        int8=_read_int8(path, status.get("data_digest")),
    )


def _read(model: type[Checked], path: Path) -> Record | None:
    """What is known of a JSON file, checked; None if it does not exist."""
    values = read_json(path)
    return None if values is None else check(model, values, str(path)).model_dump(exclude_unset=True)


def _read_int8(path: Path, data_digest: str | None) -> Record | None:
    """None where there is none, or one of a later version.

    Raises:
        InputError: it is damaged, or of other data.
    """
    raw, file = read_json(path / INT8), path / INT8
    if raw is None or raw.get("format") != INT8_FORMAT:
        return None
    values = check(Int8Values, raw, str(file)).model_dump()
    if data_digest not in (None, values["data"]):
        raise InputError(f"{file}: measured on other data. Write it again with `distill export {path} --int8`.")
    return values


def _read_analysis(path: Path, data_digest: str | None, predictions: Predictions) -> Analysis | None:
    """None where there is none, or one of a later or earlier version.

    Raises:
        InputError: it is damaged, or of other data.
    """
    raw, file = read_json(path / f"{ANALYSIS}.json"), path / f"{ANALYSIS}.safetensors"
    if raw is None or not os.path.lexists(file) or raw.get("format") != ANALYSIS_FORMAT:
        return None
    values = check(AnalysisValues, raw, f"{path / ANALYSIS}.json").model_dump(exclude_none=True)
    tensors, metadata = read_arrays(file)
    check_whole(file, metadata)
    if data_digest not in (None, values.get("data")) or metadata.get("data") != values.get("data"):
        raise InputError(f"{path / ANALYSIS}.json: made on other data. Write it again with `distill evaluate {path}`.")
    if problem := next(_misfits(values, tensors, predictions), None):
        raise InputError(f"{file}: {problem}. Write it again with `distill evaluate {path}`.")
    return Analysis(values, tensors)


def _misfits(values: Record, tensors: Mapping[str, NDArray[Any]], predictions: Predictions) -> Iterator[str]:
    """What is wrong with the tensors of an analysis; reading on after the first may raise."""
    samples, classes = predictions.logits["student.fused"].shape
    for kind in ("pictures", "attention", "neighbours"):
        numbers, images = tensors.get(f"{kind}.indices"), tensors.get(f"{kind}.images")
        if numbers is None or images is None:
            if any(name.startswith(f"{kind}.") for name in tensors):
                yield f"{kind} without images or their numbers"
            continue
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not all(0 <= number < samples for number in numbers):
            yield f"{kind}.indices are no numbers of the {samples} test images"
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(numbers):
            yield f"{kind}.images is {images.dtype} {list(images.shape)}, not uint8 [{len(numbers)}, C, H, W]"
        if len(images) and not 0 < min(images.shape[1:]) <= max(images.shape[1:]) <= LARGEST_PICTURE:
            yield f"{kind}.images are of {images.shape[1:]}"
    yield from _misfits_of_neighbours(tensors, classes)
    if (patches := tensors.get("attention.patches")) is not None:
        number, tokens = len(tensors["attention.indices"]), values.get("tokens")
        if patches.dtype.kind != "f" or patches.ndim != 5 or not patches.size or patches.shape[1] != number:
            yield f"attention.patches is {patches.dtype} {list(patches.shape)}, not [depth, {number}, tokens, H, W]"
        if tokens is None or patches.shape[2] > len(tokens.get("names") or TOKENS):
            yield f"attention.patches has {patches.shape[2]} tokens, more than have names"
        if max(patches.shape) > LARGEST_PICTURE or not np.isfinite(patches).all():
            yield "attention.patches holds what is no attention"
        for name, areas in tensors.items():
            fits = (areas.shape[:2], areas.shape[3:]) == (patches.shape[1:3], patches.shape[3:]) and areas.ndim == 5
            if name.startswith("attention.areas.") and not (areas.dtype == bool and fits):
                yield f"{name} is {areas.dtype} {list(areas.shape)}, which does not fit attention.patches"
    labels = tensors.get("validation.labels")
    for name, logits in tensors.items():
        if name.startswith("validation.") and name != "validation.labels":
            if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
                yield "validation without labels"
                return
            if not all(0 <= label < classes for label in (labels.min(), labels.max())):
                yield f"validation.labels are not among the {classes} classes"
            if logits.dtype.kind != "f" or logits.shape != (len(labels), classes):
                yield f"{name} is {logits.dtype} {list(logits.shape)}, not floats [{len(labels)}, {classes}]"


def _misfits_of_neighbours(tensors: Mapping[str, NDArray[Any]], classes: int) -> Iterator[str]:
    shown = tensors.get("neighbours.images")
    images, labels, cosines = (tensors.get(f"nearest.{name}") for name in ("images", "labels", "cosines"))
    if images is None or labels is None or cosines is None or shown is None:
        if any(name.startswith(("nearest.", "neighbours.")) for name in tensors):
            yield "neighbours without images, labels or cosines"
        return
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.shape != cosines.shape or len(labels) != len(shown):
        yield f"nearest.labels is {labels.dtype} {list(labels.shape)}, not integers [{len(shown)}, neighbours]"
    elif labels.size and not 0 <= labels.min() <= labels.max() < classes:
        yield f"nearest.labels are not among the {classes} classes"
    if cosines.dtype.kind != "f":
        yield f"nearest.cosines holds {cosines.dtype}"
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[:2] != labels.shape:
        yield f"nearest.images is {images.dtype} {list(images.shape)}, not uint8 [{len(shown)}, neighbours, C, H, W]"
    elif not 0 < min(images.shape[2:]) <= max(images.shape[2:]) <= LARGEST_PICTURE:
        yield f"nearest.images are of {images.shape[2:]}"
