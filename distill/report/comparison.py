"""Teacher, student per head and control side by side, from the files of one or more runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.files.text import visible
from distill.report.charts import COLOURS, MARKERS, TEACHER_COLOUR, TEACHER_MARKER
from distill.report.collapse import collapse
from distill.report.curves import Curves, curves_of
from distill.report.metrics import Floats, Ints, Metrics, are_numbers, decisions, measure
from distill.report.networks import (
    Measurement,
    measurement_of,
    measurements,
    student_name,
    student_network,
    teacher_name,
    teacher_network,
)
from distill.report.roles import CONTROL, STUDENT, roles_of
from distill.report.runs import RunFiles, read_run
from distill.report.statistics import PairedTest, mcnemar, wilson

UNITS = {
    "gflops": ("flops", 1e-9),
    "images_per_second": ("images_per_second", 1.0),
    "latency_ms": ("latency_seconds", 1e3),
    "megabytes": ("bytes", 1e-6),
}
"""Of the costs in a row: their key in a measurement, and the factor."""
HEAD_NAMES = {"fused": "both heads", "cls": "class head", "dist": "dist. head", "knn": "k-NN"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or one head of it."""

    run: str
    model: str
    """'teacher', 'student' or 'control'."""
    head: str | None
    """'fused', 'cls' or 'dist'; None for a model with a single head; 'knn' for one without a classifier."""
    metrics: Metrics
    parameters: int | None
    output: str
    """Its name among the predictions."""
    logits: Floats = field(repr=False, compare=False)
    source: RunFiles = field(repr=False, compare=False)
    """The run whose files hold these predictions: the control's own for a control."""
    role: str
    """What the model is to the others: `model`, or what `roles_of` says of the run."""
    architecture: str | None
    """The name of its network, where it is known."""

    @property
    def is_whole(self) -> bool:
        """A model's answer, and not that of one of its two heads."""
        return self.head in (None, "fused", "knn")

    @property
    def by_neighbours(self) -> bool:
        """Whether these are votes of neighbours, and not a classifier's probabilities."""
        return self.head == "knn"

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 %, in percent."""
        return wilson(self.metrics.top1_correct, self.metrics.samples)

    @property
    def title(self) -> str:
        """'student', 'control', or 'teacher cifar_resnet20'."""
        return f"teacher {self.architecture}" if self.model == "teacher" and self.architecture else self.role

    @property
    def label(self) -> str:
        return self.title if self.head is None else f"{self.title}, {HEAD_NAMES[self.head]}"


@dataclass(frozen=True)
class Comparison:
    """All that a report shows, computed."""

    runs: dict[str, RunFiles]
    """By the name that the report gives them."""
    rows: tuple[Row, ...]
    curves: Curves
    warnings: tuple[str, ...]
    """What a reader must know before the figures."""
    roles: dict[str, str]
    """Of each run; see `roles_of`."""
    measured: tuple[Measurement, ...]
    """The first one with a network says what it costs. One of all networks together comes first."""

    @property
    def labels(self) -> Ints:
        """Of the test images, the same for all runs."""
        return self.rows[0].source.predictions.labels

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    def called(self, run: str, what: str) -> str:
        """What a model or head of a run is called beside all others."""
        what = self.roles[run] if what == STUDENT else what
        return f"{run}: {what}" if self.several else what

    def name(self, row: Row) -> str:
        return row.label if self._is_known_teacher(row) else self.called(row.run, row.label)

    def model_name(self, row: Row) -> str:
        """The same of the model as a whole."""
        return row.title if self._is_known_teacher(row) else self.called(row.run, row.title)

    def _is_known_teacher(self, row: Row) -> bool:
        """Whether its own name is enough: runs may share a teacher."""
        alike = [other for other in self.teachers if other.architecture == row.architecture]
        return row.model == "teacher" and row.architecture is not None and len(alike) == 1

    def colour(self, run: str, model: str) -> str:
        """Of a model in every chart."""
        return TEACHER_COLOUR if model == "teacher" else COLOURS[self._index(run, model) % len(COLOURS)]

    def marker(self, run: str, model: str) -> str:
        """The same in shape: colours come again sooner."""
        return TEACHER_MARKER if model == "teacher" else MARKERS[self._index(run, model) % len(MARKERS)]

    def _index(self, run: str, model: str) -> int:
        models = [(name, kind) for name, files in self.runs.items() for kind, _ in files.models]
        return models.index((run, model))

    @property
    def wholes(self) -> list[Row]:
        """One row for each model: its answer."""
        return [row for row in self.rows if row.is_whole]

    @property
    def teachers(self) -> list[Row]:
        """One row for each: runs may share one."""
        return [row for row in self.rows if row.model == "teacher"]

    def teacher_of(self, run: str) -> Row | None:
        """The teacher's row; the one of an earlier run where they share it."""
        logits = self.runs[run].predictions.logits.get("teacher")
        return None if logits is None else next((row for row in self.teachers if _equal(row.logits, logits)), None)

    def row(self, run: str, model: str) -> Row | None:
        """The answer of a run's 'student' or 'control'."""
        return next((row for row in self.wholes if (row.run, row.model) == (run, model)), None)

    def control_of(self, run: str) -> Row | None:
        """The control's answer: the run's own, that of another run whose control would be the same, or a run that is
        this control.
        """
        own, digest = self.row(run, "control"), self.runs[run].control_digest
        if own is not None or digest is None:
            return own
        others = [self.row(name, "control") for name, other in self.runs.items() if other.control_digest == digest]
        others += [
            self.row(name, "student")
            for name, other in self.runs.items()
            if self.roles[name] == CONTROL and other.recipe_digest == digest
        ]
        return next((row for row in others if row is not None), None)

    def test(self, first: Row, second: Row) -> PairedTest:
        rights = [decisions(row.logits) == self.labels for row in (first, second)]
        return mcnemar(self.name(first), self.name(second), *rights)

    def costs(self, row: Row) -> dict[str, Any]:
        """What its model costs, as far as it is known. A control has the costs of its student, the same network."""
        network, measurement = self.network(row), self.measurement(row)
        found = {} if measurement is None else measurement.costs[network]
        known = {name: unit * found[key] if found else None for name, (key, unit) in UNITS.items()}
        apart = measurement is not None and measurement is not self.measured[0]
        where = f"apart, on {measurement.machine}" if measurement is not None and apart else None
        return {"parameters": row.parameters, **known, "measured_apart": where}

    def network(self, row: Row) -> str:
        """Equal for models that compute the same with other weights."""
        return (teacher_network if row.model == "teacher" else student_network)(self.runs[row.run])

    def measurement(self, *rows: Row) -> Measurement | None:
        """The one that says what these models cost, together."""
        return measurement_of(self.measured, *map(self.network, rows))

    @property
    def networks(self) -> dict[str, tuple[str, str]]:
        """All that are compared: a run that has it, and whether as 'student' or as 'teacher'."""
        found: dict[str, tuple[str, str]] = {}
        for row in self.wholes:
            kind = "teacher" if row.model == "teacher" else "student"
            found.setdefault(self.network(row), (row.run, kind))
        return found

    def record(self, row: Row) -> dict[str, Any]:
        """All figures of a row as plain data; accuracies in percent, beside the counts they come from."""
        named = {"run": row.run, "model": row.role, "head": row.head, "network": row.architecture}
        return {**named, **row.metrics._asdict(), "top1_interval": row.top1_interval, **self.costs(row)}

    @property
    def samples(self) -> int:
        return self.rows[0].metrics.samples

    @property
    def k(self) -> int:
        """Of top-k."""
        return self.rows[0].metrics.k


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare one or more finished runs on the same test set.

    Raises:
        InputError: no run is given, or one twice; one is missing or unfinished; two have different test sets.
    """
    if not runs:
        raise InputError("compare: give at least one run directory.")
    named = _named(runs)
    first, *others = [files for run in named.values() for _, files in run.models]
    for other in others:
        _same_test_set(first, other)
    rows: list[Row] = []
    roles = roles_of(named)
    for row in (row for name, run in named.items() for row in _rows(name, run, roles[name])):
        # A teacher that several runs have is one row.
        if row.model != "teacher" or not any(_equal(row.logits, other.logits) for other in rows):
            rows.append(row)
    return Comparison(
        runs=named,
        rows=tuple(rows),
        curves=curves_of(named),
        roles=roles,
        measured=tuple(measurements(named)),
        warnings=(
            *(
                f"{name}: the checkpoint was chosen on the test set (data.select_on: test). The figures on that same "
                "test set are therefore optimistic."
                for name, run in named.items()
                if run.selected_on_test
            ),
            *(
                f"{name if model == 'student' else f'{name}, {model}'}: {problem}"
                for name, run in named.items()
                for model, files in run.models
                if (problem := collapse(files.recipe, files.events)) is not None
            ),
            *(
                f"{row.run}, {row.label}: {missing:,} of {row.metrics.samples:,} rows of logits are not numbers; they "
                "count as wrong answers."
                for row in rows
                if (missing := int((~are_numbers(row.logits)).sum()))
            ),
        ),
    )


def _equal(one: Floats, other: Floats) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def _named(paths: Sequence[Path]) -> dict[str, RunFiles]:
    resolved = [path.resolve() for path in paths]
    for path, where in zip(paths, resolved, strict=True):
        if resolved.count(where) > 1:
            raise InputError(f"{path}: the run is given twice.")
    names = [where.name for where in resolved]
    return {
        visible(where.name if names.count(where.name) == 1 else str(path)): read_run(path)
        for path, where in zip(paths, resolved, strict=True)
    }


def _same_test_set(one: RunFiles, other: RunFiles) -> None:
    digests = one.data_digest, other.data_digest
    if (None not in digests and digests[0] != digests[1]) or not np.array_equal(
        one.predictions.labels, other.predictions.labels
    ):
        raise InputError(f"{one.path} and {other.path} were evaluated on different test sets and cannot be compared.")


def _rows(name: str, run: RunFiles, role: str) -> Iterator[Row]:
    labels, teacher = run.predictions.labels, run.predictions.logits.get("teacher")
    if teacher is not None:
        metrics = measure(teacher, labels)
        parameters = run.parameters("teacher")
        yield Row(name, "teacher", None, metrics, parameters, "teacher", teacher, run, "teacher", teacher_name(run))
    for model, files in run.models:
        parameters, called = files.parameters("student"), role if model == "student" else model
        for head, output, logits in files.predictions.heads:
            metrics = measure(logits, labels, teacher)
            yield Row(name, model, head, metrics, parameters, output, logits, files, called, student_name(files))
