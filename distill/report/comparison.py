"""Teacher, student per head and control side by side, from the files of one or more runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.errors import InputError
from distill.files.text import visible
from distill.report.curves import Curves, curves_of
from distill.report.metrics import Floats, Ints, Metrics, measure
from distill.report.runs import RunFiles, read_run
from distill.report.statistics import Verdict, mcnemar, wilson

HEADS = {"fused": "student.fused", "cls": "student.cls", "dist": "student.dist"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, or one head of it."""

    run: str
    model: str
    """'teacher', 'student' or 'control'."""
    head: str | None
    """'fused', 'cls' or 'dist'; None for a model with a single head."""
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
        return self.head in (None, "fused")

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 %, in percent."""
        return wilson(self.metrics.top1_correct, self.metrics.samples)

    @property
    def label(self) -> str:
        return self.model if self.head is None else f"{self.model}, {HEAD_NAMES[self.head]}"


HEAD_NAMES = {"fused": "both heads", "cls": "class head", "dist": "dist. head"}


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

    def name(self, row: Row) -> str:
        """What a row is called beside all others."""
        return f"{row.run}: {row.label}" if self.several else row.label

    def model_name(self, row: Row) -> str:
        """The same of the model as a whole."""
        return f"{row.run}: {row.model}" if self.several else row.model

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
        return next((row for row in self.teachers if logits is not None and np.array_equal(row.logits, logits)), None)

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

    def verdict(self, a: Row, b: Row) -> Verdict:
        rights = [row.logits.argmax(1) == self.labels for row in (a, b)]
        return mcnemar(self.name(a), self.name(b), *rights)

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
    every = [part for run in named.values() for part in (run, run.control) if part is not None]
    for other in every[1:]:
        _same_test_set(every[0], other)
    return Comparison(
        runs=named,
        rows=tuple(_without_shared_teachers(row for name, run in named.items() for row in _rows(name, run))),
        curves=curves_of(named),
        warnings=tuple(
            f"{name}: the checkpoint was chosen on the test set (data.select_on: test). The figures on that same "
            "test set are therefore optimistic."
            for name, run in named.items()
            if run.selected_on_test
        ),
    )


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


def _without_shared_teachers(rows: Iterable[Row]) -> Iterator[Row]:
    """A teacher that several runs have is one row."""
    seen: list[Floats] = []
    for row in rows:
        if row.model == "teacher":
            if any(np.array_equal(row.logits, logits) for logits in seen):
                continue
            seen.append(row.logits)
        yield row


def _rows(name: str, run: RunFiles) -> Iterator[Row]:
    labels, teacher = run.predictions.labels, run.predictions.logits.get("teacher")
    if teacher is not None:
        metrics = measure(teacher, labels)
        yield Row(name, "teacher", None, metrics, run.parameters("teacher"), "teacher", teacher, run)
    for model, part in (("student", run), ("control", run.control)):
        if part is None:
            continue
        logits = part.predictions.logits
        heads = HEADS if "student.dist" in logits else {"fused": HEADS["fused"]}
        for head, key in heads.items():
            if key in logits:
                metrics = measure(logits[key], labels, teacher)
                shown = head if len(heads) > 1 else None
                yield Row(name, model, shown, metrics, part.parameters("student"), key, logits[key], part)
