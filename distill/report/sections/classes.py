"""Classes: accuracy by class and how it changed, and what is confused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from distill.report.charts import Chart, short
from distill.report.comparison import Comparison, Row
from distill.report.metrics import Floats, Ints, decisions
from distill.report.page import Cell, Column, Part, Plot, Section, Table, cell

DRAWN = 30
"""Classes in a chart, at most: those that vary most between the models."""
WHOLE_MATRIX = 20
"""Classes of a matrix that is shown whole."""
PAIRS = 10

Confusion = NDArray[np.int64]


class Model(NamedTuple):
    name: str
    row: Row
    matrix: Confusion
    accuracy: list[float | None]
    """By class, in percent; None for a class without test images."""


class Pair(NamedTuple):
    """Images of one class that are taken for another."""

    label: int
    taken_for: int
    images: int


def confusion(logits: Floats, labels: Ints) -> Confusion:
    """int64 [classes, classes]: row the label, column the answer; images without an answer are left out."""
    matrix: Confusion = confusion_matrix(labels, decisions(logits), labels=np.arange(logits.shape[1]))
    return matrix


def accuracy_by_class(matrix: Confusion, labels: Ints) -> list[float | None]:
    """In percent of the images with each label; None where there are none."""
    totals, right = np.bincount(labels, minlength=len(matrix)).tolist(), np.diag(matrix).tolist()
    return [100 * correct / total if total else None for correct, total in zip(right, totals, strict=True)]


def most_confused(matrix: Confusion, number: int) -> list[Pair]:
    """The largest counts beside the diagonal, by falling count, then by class; none of 0."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(order, matrix.shape), mistakes.flat[order], strict=True)
    return [Pair(*map(int, pair)) for pair in pairs if pair[2]]


def build(comparison: Comparison) -> Section | None:
    names = comparison.rows[0].source.class_names
    models = []
    for row in comparison.wholes:
        matrix = confusion(row.logits, comparison.labels)
        models.append(Model(comparison.model_name(row), row, matrix, accuracy_by_class(matrix, comparison.labels)))
    student = next(model for model in models if model.row.model == "student")
    whole = len(names) <= WHOLE_MATRIX
    of = "each class" if len(names) <= DRAWN else f"the {DRAWN} classes that vary most"
    parts: list[Part] = [
        Plot("classes", "Accuracy by class", f"Of {of}.", _chart(comparison, models, names)),
        _table(models, student, _others(comparison, models, student), names, folded=not whole),
        _averages(models, names),
    ]
    if whole:
        parts += [_matrix(model, index, names, folded=model is not student) for index, model in enumerate(models)]
    known = [(value, names[index]) for index, value in enumerate(student.accuracy) if value is not None]
    (worst, where), (best, at) = min(known), max(known)
    says = (
        f"The accuracy of the {student.name} runs from {worst:.2f} % ({where}) to {best:.2f} % ({at}), and its mean "
        f"over the classes is {student.row.metrics.macro:.2f} %"
    )
    if pairs := most_confused(student.matrix, PAIRS):
        label, taken_for, images = pairs[0]
        times = "once" if images == 1 else f"{images:,} times"
        says += f"; most often it takes {names[label]} for {names[taken_for]} ({times})"
        records = [
            {"class": names[label], "taken for": names[taken_for]}
            | {model.name: int(model.matrix[label, taken_for]) for model in models}
            for label, taken_for, _ in pairs
        ]
        columns: list[Column] = [("class", "class", ""), ("taken for", "taken for", "")]
        columns += [(model.name, model.name, ",d") for model in models]
        caption = f"The pairs that the {student.name} confuses most: how often each model does."
        parts.append(Table.of("confused", caption, records, columns))
    data = [
        {
            "model": model.name,
            "accuracy": dict(zip(names, model.accuracy, strict=True)),
            "macro": model.row.metrics.macro,
            "worst_class": model.row.metrics.worst_class,
            "most_confused": [
                {"class": names[label], "taken_for": names[taken_for], "count": images}
                for label, taken_for, images in most_confused(model.matrix, PAIRS)
            ],
            **({"confusion": model.matrix.tolist()} if whole else {}),
        }
        for model in models
    ]
    return Section("classes", "Classes", f"{says}.", parts, data)


def _others(comparison: Comparison, models: list[Model], student: Model) -> list[Model]:
    """Its teacher and its control, in this order, where they are there."""
    rows = [comparison.teacher_of(student.row.run), comparison.control_of(student.row.run)]
    return [model for row in rows for model in models if model.row is row]


def _table(models: list[Model], student: Model, others: list[Model], names: tuple[str, ...], *, folded: bool) -> Table:
    rows = []
    for index, name in enumerate(names):
        cells = [Cell(name), cell(int(student.matrix[index].sum()), ",d")]
        cells += [cell(model.accuracy[index], ".2f") for model in models]
        for other in others:
            ours, theirs = student.accuracy[index], other.accuracy[index]
            points = None if ours is None or theirs is None else ours - theirs
            cells.append(cell(points, "+.2f", good=points > 0 if points else None))
        rows.append(cells)
    header = ["class", "images", *(f"{model.name} %" for model in models)]
    header += [f"against {other.row.title}" for other in others]
    caption = "Accuracy by class."
    if others:
        caption += f" The {student.name} against {' and '.join(other.name for other in others)}, in points."
    return Table("per-class", caption, header, rows, folded=folded, span=2)


def _averages(models: list[Model], names: tuple[str, ...]) -> Table:
    records = []
    for model in models:
        metrics = model.row.metrics
        records.append({"model": model.name, **metrics._asdict(), "worst": names[_worst(model.accuracy)]})
    columns: list[Column] = [
        ("model", "model", ""),
        ("worst class", "worst", ""),
        ("its accuracy %", "worst_class", ".2f"),
        ("macro %", "macro", ".2f"),
        ("top-1 %", "top1", ".2f"),
    ]
    caption = "Macro: mean of the accuracies of the classes, however many test images they have."
    return Table.of("class-averages", caption, records, columns)


def _worst(accuracy: list[float | None]) -> int:
    """The class of the lowest accuracy, the first of equals."""
    return min((value, index) for index, value in enumerate(accuracy) if value is not None)[1]


def _chart(comparison: Comparison, models: list[Model], names: tuple[str, ...]) -> Chart:
    values = np.array([model.accuracy for model in models], dtype=np.float64)
    order = np.flatnonzero(~np.isnan(values[0]))
    order = np.sort(order[np.argsort(-np.ptp(values[:, order], axis=0), kind="stable")[:DRAWN]])
    values, shown = values[:, order], [names[index] for index in order]
    chart = Chart("right (%)", "", size=(4.7, 1.0 + 0.22 * max(4, len(order))))
    heights = range(len(shown))
    chart.axes.hlines(heights, values.min(0), values.max(0), color="#808080", alpha=0.4, linewidth=1)
    for (name, row, *_), accuracy in zip(models, values.tolist(), strict=True):
        chart.line(
            accuracy,
            heights,
            [f"{name}, {of}: {value:.2f} %" for of, value in zip(shown, accuracy, strict=True)],
            color=comparison.colour(row.run, row.model),
            linestyle="",
            marker=comparison.marker(row.run, row.model),
            markersize=5.5,
            label=name,
        )
    chart.axes.set_yticks(heights, [short(name, 22) for name in shown])
    chart.axes.invert_yaxis()
    chart.legend()
    return chart


def _matrix(model: Model, index: int, names: tuple[str, ...], *, folded: bool) -> Table:
    shares = model.matrix / np.maximum(1, model.matrix.sum(1, keepdims=True))
    rows = [
        [
            Cell(names[label]),
            *(
                Cell(f"{count:,}" if count else "", heat=float(shares[label, answer]), good=label == answer)
                for answer, count in enumerate(line)
            ),
        ]
        for label, line in enumerate(model.matrix)
    ]
    caption = f"Confusion matrix of the {model.name}: rows are the right classes, columns the answers."
    return Table(f"confusion-{index}", caption, ["class", *names], rows, folded=folded, matrix=True)
