"""Teacher, student per head and control side by side, from the files of one or more runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.files.text import visible
from distill.report.charts import COLOURS, TEACHER_COLOUR
from distill.report.collapse import collapse
from distill.report.curves import Curves, curves_of
from distill.report.metrics import Floats, Ints, Metrics, are_numbers, decisions, measure
from distill.report.runs import RunFiles, read_run
from distill.report.statistics import PairedTest, mcnemar, wilson

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
    def label(self) -> str:
        return self.model if self.head is None else f"{self.model}, {HEAD_NAMES[self.head]}"


@dataclass(frozen=True)
class Comparison:
    """All that a report shows, computed."""

    runs: dict[str, RunFiles]
    """By the name that the report gives them."""
    rows: tuple[Row, ...]
    curves: Curves
    warnings: tuple[str, ...]
    """What a reader must know before the figures."""

    @property
    def labels(self) -> Ints:
        """Of the test images, the same for all runs."""
        return self.rows[0].source.predictions.labels

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    def called(self, run: str, what: str) -> str:
        """What a model or head of a run is called beside all others."""
        return f"{run}: {what}" if self.several else what

    def name(self, row: Row) -> str:
        return self.called(row.run, row.label)

    def model_name(self, row: Row) -> str:
        """The same of the model as a whole."""
        return self.called(row.run, row.model)

    def colour(self, run: str, model: str) -> str:
        """Of a model in every chart."""
        if model == "teacher":
            return TEACHER_COLOUR
        models = [(name, kind) for name, files in self.runs.items() for kind, _ in files.models]
        return COLOURS[models.index((run, model)) % len(COLOURS)]

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
        """The control's answer: the run's own, or that of another run whose control would be the same."""
        own, digest = self.row(run, "control"), self.runs[run].control_digest
        if own is not None or digest is None:
            return own
        others = (self.row(name, "control") for name, other in self.runs.items() if other.control_digest == digest)
        return next((row for row in others if row is not None), None)

    def test(self, first: Row, second: Row) -> PairedTest:
        rights = [decisions(row.logits) == self.labels for row in (first, second)]
        return mcnemar(self.name(first), self.name(second), *rights)

    def costs(self, row: Row) -> dict[str, Any]:
        """What its model costs, as far as it is known. A control has the speed of its student, the same network, which
        was measured in turns with the teacher.
        """
        measured = self.runs[row.run].costs("teacher" if row.model == "teacher" else "student")
        units = {
            "gflops": ("flops", 1e-9),
            "images_per_second": ("images_per_second", 1.0),
            "latency_ms": ("latency_seconds", 1e3),
            "megabytes": ("bytes", 1e-6),
        }
        known = {name: unit * measured[key] if key in measured else None for name, (key, unit) in units.items()}
        return {"parameters": row.parameters, **known}

    def record(self, row: Row) -> dict[str, Any]:
        """All figures of a row as plain data; accuracies in percent, beside the counts they come from."""
        named = {"run": row.run, "model": row.model, "head": row.head}
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
    for row in (row for name, run in named.items() for row in _rows(name, run)):
        # A teacher that several runs have is one row.
        if row.model != "teacher" or not any(_equal(row.logits, other.logits) for other in rows):
            rows.append(row)
    return Comparison(
        runs=named,
        rows=tuple(rows),
        curves=curves_of(named),
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


def _rows(name: str, run: RunFiles) -> Iterator[Row]:
    labels, teacher = run.predictions.labels, run.predictions.logits.get("teacher")
    if teacher is not None:
        metrics = measure(teacher, labels)
        yield Row(name, "teacher", None, metrics, run.parameters("teacher"), "teacher", teacher, run)
    for model, files in run.models:
        parameters = files.parameters("student")
        for head, output, logits in files.predictions.heads:
            yield Row(name, model, head, measure(logits, labels, teacher), parameters, output, logits, files)
