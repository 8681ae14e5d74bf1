"""Robustness: accuracy under corruptions of the test images."""

from __future__ import annotations

from dataclasses import dataclass

from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.page import Cell, Panel, Part, Section, Table, number
from distill.report.sections.learning import colour, key_of


@dataclass(frozen=True)
class Accuracies:
    """Of one model, in percent: by corruption, a value for each severity, the first for images as they are."""

    row: Row
    images: int
    by_name: dict[str, list[float]]

    def mean(self, name: str) -> float:
        """Over the severities."""
        values = self.by_name[name][1:]
        return sum(values) / len(values)

    @property
    def clean(self) -> float:
        return next(iter(self.by_name.values()))[0]

    @property
    def mean_of_all(self) -> float:
        return sum(map(self.mean, self.by_name)) / len(self.by_name)


def build(comparison: Comparison) -> Section | None:
    found = [accuracies for row in comparison.rows if (accuracies := _of(row)) is not None]
    if not found:
        return None
    wholes = [accuracies for accuracies in found if accuracies.row.is_whole]
    numbers = sorted({accuracies.images for accuracies in found})
    on = f"{numbers[0]:,} test images" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,} test images"
    if numbers[-1] < comparison.samples:
        on += ", as many of each class"
    caption = (
        "Accuracy under CIFAR-10-C's corruptions (Hendrycks and Dietterich 2019) at severities 1 to 5; 0 is the images "
        "as they are. On images larger than 32 px the blur grows with them."
    )
    shown = [accuracies.row for accuracies in wholes]
    parts: list[Part] = [
        Panel("corrupted", caption, _charts(comparison, wholes), key_of(comparison, shown)),
        _table(comparison, found, on),
    ]
    data = [
        {
            "model": comparison.name(accuracies.row),
            "images": accuracies.images,
            "clean": accuracies.clean,
            "mean": accuracies.mean_of_all,
            "accuracy": accuracies.by_name,
        }
        for accuracies in found
    ]
    lost = ", ".join(
        f"the {comparison.model_name(accuracies.row)} {accuracies.clean:.2f} to {accuracies.mean_of_all:.2f} %"
        for accuracies in wholes
    )
    says = f"From the images as they are to the mean of {len(found[0].by_name)} corruptions, on {on}: {lost}."
    return Section("robustness", "Robustness", says, parts, data)


def _of(row: Row) -> Accuracies | None:
    if row.source.analysis is None:
        return None
    values = row.source.analysis.values["robustness"]
    counts = {name: by_output[row.output] for name, by_output in values["correct"].items() if row.output in by_output}
    images = values["images"]
    by_name = {name: [100 * count / images for count in levels] for name, levels in counts.items()}
    return Accuracies(row, images, by_name) if by_name else None


def _charts(comparison: Comparison, wholes: list[Accuracies]) -> list[tuple[str, Chart]]:
    charts = []
    for name in wholes[0].by_name:
        chart = Chart(size=(3.1, 2.3))
        for accuracies in wholes:
            model = comparison.model_name(accuracies.row)
            levels = accuracies.by_name.get(name, [])
            chart.line(
                range(len(levels)),
                levels,
                [f"{model}, {name} {level}: {value:.2f} %" for level, value in enumerate(levels)],
                color=colour(comparison, accuracies.row.run, accuracies.row.model),
            )
        chart.label("severity", "right (%)")
        chart.axes[0].set_ylim(0, 102)
        charts.append((name, chart))
    return charts


def _table(comparison: Comparison, found: list[Accuracies], on: str) -> Table:
    names = list(found[0].by_name)
    rows = [
        [
            Cell(comparison.name(accuracies.row)),
            number(accuracies.clean, ".2f"),
            *(number(accuracies.mean(name), ".2f") for name in names),
            number(accuracies.mean_of_all, ".2f"),
        ]
        for accuracies in found
    ]
    caption = f"Accuracy in percent on {on}: as they are, then means over five severities."
    return Table("corruptions", caption, ["model", "as they are", *names, "mean"], rows)
