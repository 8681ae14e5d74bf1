"""A run directory, read: the files that a report is made of, and nothing that needs a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from distill.errors import InputError
from distill.files.metrics import read_lines
from distill.files.text import read_json
from distill.recipe import OPERATIONAL_KEYS, Recipe, from_mapping, read_mapping
from distill.registry import check_available
from distill.report.metrics import Predictions, check_whole, read_arrays, read_predictions

Record = Mapping[str, Any]
ANALYSIS = "analysis"
ANALYSIS_FORMAT = "1"


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
    """The resolved one as plain data, unchecked: a report on a run of an earlier version is still a report."""
    environment: Record
    events: tuple[Record, ...]
    """The lines of metrics.jsonl in their order."""
    control: RunFiles | None
    analysis: Analysis | None
    """None for a run of an earlier version."""
    config: Record
    """config.json of the exported student."""

    @property
    def models(self) -> list[tuple[str, RunFiles]]:
        """What was trained: the student and, if there is one, the control."""
        return [("student", self)] + ([] if self.control is None else [("control", self.control)])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class of the logits; their numbers where the run did not record names."""
        classes = next(iter(self.predictions.logits.values())).shape[1]
        names = self.config.get("label_names")
        if isinstance(names, list) and len(names) == classes:
            return tuple(map(str, names))
        return tuple(map(str, range(classes)))

    def costs(self, model: str) -> Record:
        """Of 'student' or 'teacher', as measured; empty where it was not."""
        costs: Record = {} if self.analysis is None else self.analysis.values["costs"].get(model, {})
        return costs

    @property
    def seconds(self) -> Record:
        """By what the time went to: training, compilation, evaluation, analysis."""
        recorded = self.status.get("seconds")
        return recorded if isinstance(recorded, dict) else {}

    @property
    def training_seconds(self) -> float | None:
        """Time of the training steps. Where it is not recorded, the time between the lines of the metrics, without the
        pauses before a resumption and the control's own training; None without lines.
        """
        if recorded := self.seconds.get("training"):
            return float(recorded)
        total, before = 0.0, None
        for event in self.events:
            now = event.get("time")
            if not isinstance(now, int | float) or not math.isfinite(now):
                continue
            if before is not None and event.get("event") not in ("resume", "start", "control"):
                total += max(0.0, now - before)
            before = now
        return total or None

    @cached_property
    def known_recipe(self) -> Recipe | None:
        """The recipe, checked; None where it is of a version that knew other keys."""
        try:
            return from_mapping(self.recipe)
        except InputError:
            return None

    @cached_property
    def control_digest(self) -> str | None:
        """Identifies the control that this run has or would have; None where it distils nothing, or its recipe is not
        known.
        """
        recipe = self.known_recipe
        return recipe.as_control().digest(OPERATIONAL_KEYS) if recipe is not None and recipe.distill else None

    @property
    def data_digest(self) -> str | None:
        """Identifies the data; None where the run did not record it."""
        return self.status.get("data_digest")

    @property
    def selected_on_test(self) -> bool:
        return (self.recipe.get("data") or {}).get("select_on") == "test"

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
    status = read_json(path / "status.json")
    if status is None:
        raise InputError(f"{path}: not a run directory: it has no status.json.")
    state = status.get("state")
    if state != "finished":
        raise InputError(f"{path}: the run is not finished (its state is '{state}'). Resume it, then compare.")
    environment = read_json(path / "environment.json") or {}
    check_available(environment.get("variants", {}), str(path))
    return RunFiles(
        path=path,
        predictions=read_predictions(path / "predictions.safetensors"),
        status=status,
        recipe=read_mapping(recipe) if (recipe := path / "resolved.yaml").exists() else {},
        environment=environment,
        events=tuple(read_lines(path / "metrics.jsonl", finished=True)),
        control=read_run(path / "control") if (path / "control").is_dir() else None,
        analysis=_read_analysis(path, status.get("data_digest")),
        config=read_json(path / "export" / "config.json") or {},
    )


def _read_analysis(path: Path, data_digest: str | None) -> Analysis | None:
    """None where there is none, or one of a later or earlier version.

    Raises:
        InputError: it is damaged, or of other data.
    """
    values, file = read_json(path / f"{ANALYSIS}.json"), path / f"{ANALYSIS}.safetensors"
    if values is None or not file.exists() or values.get("format") != ANALYSIS_FORMAT:
        return None
    tensors, metadata = read_arrays(file)
    check_whole(file, metadata)
    if data_digest not in (None, values.get("data")) or metadata.get("data") != values.get("data"):
        raise InputError(f"{path / ANALYSIS}.json: made on other data. Write it again with `distill evaluate {path}`.")
    return Analysis(values, tensors)
