"""Classes: accuracy by class and how it changed, and what is confused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.report.charts import Chart, short
from distill.report.classes import Confusion, accuracy_by_class, confusion, most_confused
from distill.report.comparison import Comparison, Row
from distill.report.page import Cell, Part, Plot, Section, Table, number
from distill.report.sections.learning import colour

DRAWN = 30
"""Classes in a chart, at most: those that changed most."""
WHOLE_MATRIX = 20
"""Classes of a matrix that is shown whole."""
PAIRS = 10


def build(comparison: Comparison) -> Section | None:
    models = comparison.wholes
    names = comparison.rows[0].source.class_names
    matrices = [confusion(row.logits, comparison.labels) for row in models]
    accuracies = [accuracy_by_class(matrix) for matrix in matrices]
    student = next(index for index, row in enumerate(models) if row.model == "student")
    parts: list[Part] = [
        Plot(
            "classes",
            "Accuracy by class",
            f"Of {'the ' + str(DRAWN) + ' classes that vary most' if len(names) > DRAWN else 'each class'}.",
            _chart(comparison, models, accuracies, names),
        ),
        _table(comparison, models, accuracies, matrices[0], names, student),
    ]
    if len(names) <= WHOLE_MATRIX:
        parts += [
            _matrix(comparison, row, matrix, names, folded=index != student)
            for index, (row, matrix) in enumerate(zip(models, matrices, strict=True))
        ]
    parts.append(_pairs(comparison, models, matrices, names, student))
    return Section(
        "classes",
        "Classes",
        _says(comparison, models, accuracies, matrices, names, student),
        parts,
        _data(comparison, models, accuracies, matrices, names),
    )


def _says(
    comparison: Comparison,
    models: Sequence[Row],
    accuracies: Sequence[Sequence[float | None]],
    matrices: Sequence[Confusion],
    names: Sequence[str],
    student: int,
) -> str:
    own = accuracies[student]
    known = [(value, index) for index, value in enumerate(own) if value is not None]
    (worst, where), (best, at) = min(known), max(known)
    says = f"The student's accuracy runs from {worst:.2f} % ({names[where]}) to {best:.2f} % ({names[at]})"
    if pairs := most_confused(matrices[student], 1):
        pair = pairs[0]
        times = "once" if pair.images == 1 else f"{pair.images:,} times"
        says += f"; most often it takes {names[pair.label]} for {names[pair.taken_for]} ({times})"
    return says + "."


def _others(models: Sequence[Row], student: int) -> list[int]:
    """What the student's change is measured against: its teacher and its control, in this order."""
    run = models[student].run
    control = [index for index, row in enumerate(models) if row.model == "control" and row.run == run]
    return [index for index, row in enumerate(models) if row.model == "teacher"][:1] + control


def _table(
    comparison: Comparison,
    models: Sequence[Row],
    accuracies: Sequence[Sequence[float | None]],
    matrix: Confusion,
    names: Sequence[str],
    student: int,
) -> Table:
    others = _others(models, student)
    header = ["class", "images", *(f"{comparison.model_name(row)} %" for row in models)]
    header += [f"against {models[other].model}" for other in others]
    rows = []
    for index, name in enumerate(names):
        cells = [Cell(name, index if name.isdigit() else name), number(int(matrix[index].sum()), ",d")]
        cells += [number(values[index], ".2f") for values in accuracies]
        for other in others:
            one, base = accuracies[student][index], accuracies[other][index]
            if one is None or base is None:
                cells.append(Cell(""))
            else:
                cells.append(Cell(f"{one - base:+.2f}", one - base, good=None if one == base else one > base))
        rows.append(cells)
    caption = "Accuracy by class; the student against the others, in points."
    return Table("per-class", caption, header, rows, folded=len(names) > WHOLE_MATRIX, span=2)


def _chart(
    comparison: Comparison, models: Sequence[Row], accuracies: Sequence[Sequence[float | None]], names: Sequence[str]
) -> Chart:
    values = np.array([[np.nan if value is None else value for value in row] for row in accuracies])
    order = [index for index in range(len(names)) if not np.isnan(values[0, index])]
    if len(order) > DRAWN:
        order = sorted(sorted(order, key=lambda index: -float(np.ptp(values[:, index])))[:DRAWN])
    chart = Chart(size=(4.7, 1.0 + 0.22 * max(4, len(order))))
    axes = chart.axes[0]
    places = list(range(len(order)))
    axes.hlines(places, values[:, order].min(0), values[:, order].max(0), color="#808080", alpha=0.4, linewidth=1)
    for row, accuracy in zip(models, values, strict=True):
        name = comparison.model_name(row)
        chart.line(
            [accuracy[index] for index in order],
            places,
            [f"{name}, {names[index]}: {accuracy[index]:.2f} %" for index in order],
            color=colour(comparison, row.run, row.model),
            linestyle="",
            marker="D" if row.model == "teacher" else "o",
            markersize=5.5,
            label=name,
        )
    axes.set_yticks(places, [short(names[index], 22) for index in order])
    axes.invert_yaxis()
    chart.label("right (%)", "")
    chart.legend_below()
    return chart


def _matrix(comparison: Comparison, row: Row, matrix: Confusion, names: Sequence[str], *, folded: bool) -> Table:
    sizes = np.maximum(1, matrix.sum(1))
    rows = [
        [
            Cell(name),
            *(
                Cell(f"{count:,}" if count else "", int(count), heat=float(count / size), good=place == index)
                for place, count in enumerate(line)
            ),
        ]
        for index, (name, line, size) in enumerate(zip(names, matrix, sizes, strict=True))
    ]
    caption = f"Confusion matrix of the {comparison.model_name(row)}: rows are the right classes, columns the answers."
    name = f"confusion-{comparison.wholes.index(row)}"
    return Table(name, caption, ["", *names], rows, folded=folded, matrix=True)


def _pairs(
    comparison: Comparison, models: Sequence[Row], matrices: Sequence[Confusion], names: Sequence[str], student: int
) -> Table:
    header = ["class", "taken for", *(comparison.model_name(row) for row in models)]
    rows = [
        [
            Cell(names[pair.label]),
            Cell(names[pair.taken_for]),
            *(number(int(matrix[pair.label, pair.taken_for]), ",d") for matrix in matrices),
        ]
        for pair in most_confused(matrices[student], PAIRS)
    ]
    return Table("confused", "The pairs that the student confuses most: how often each model does.", header, rows, 2)


def _data(
    comparison: Comparison,
    models: Sequence[Row],
    accuracies: Sequence[Sequence[float | None]],
    matrices: Sequence[Confusion],
    names: Sequence[str],
) -> list[dict[str, object]]:
    return [
        {
            "model": comparison.model_name(row),
            "accuracy": dict(zip(names, values, strict=True)),
            "most_confused": [
                {"class": names[pair.label], "taken_for": names[pair.taken_for], "count": pair.images}
                for pair in most_confused(matrix, PAIRS)
            ],
            **({"confusion": matrix.tolist()} if len(names) <= WHOLE_MATRIX else {}),
        }
        for row, values, matrix in zip(models, accuracies, matrices, strict=True)
    ]
