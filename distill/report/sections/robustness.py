"""Robustness: accuracy under corruptions of the test images."""

from __future__ import annotations

from statistics import mean
from typing import Any

from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.page import Column, Part, Plot, Section, Table


def build(comparison: Comparison) -> Section | None:
    found = [
        (row, record)
        for row in comparison.rows
        if row.source.analysis is not None
        and (measured := row.source.analysis.values.get("robustness")) is not None
        and (record := _record(comparison.name(row), row.output, measured)) is not None
    ]
    if not found:
        return None
    records = [record for _, record in found]
    wholes = [(row, record) for row, record in found if row.is_whole]
    corruptions = [name for name in records[0]["accuracy"] if all(name in record["accuracy"] for record in records)]
    if not corruptions:
        return None
    least, most = (pick(record["images"] for record in records) for pick in (min, max))
    on = f"{most:,} test images" if least == most else f"{least:,} to {most:,} test images"
    if most < comparison.samples:
        on += ", as many of each class"
    caption = "By severity; 0 is the images as they are."
    parts: list[Part] = [
        Plot(f"corrupted-{index}", f"Under {name}", caption, _chart(comparison, wholes, name))
        for index, name in enumerate(corruptions)
    ]
    columns: list[Column] = [("model", "model", ""), ("as they are", "clean", ".2f")]
    columns += [(name, name, ".2f") for name in corruptions]
    parts.append(
        Table.of(
            "corruptions",
            f"Accuracy in percent on {on}: as they are, then means over five severities of CIFAR-10-C's corruptions "
            "(Hendrycks and Dietterich 2019). On images larger than 32 px the blur grows with them.",
            [record | {name: mean(record["accuracy"][name][1:]) for name in corruptions} for record in records],
            [*columns, ("mean", "mean", ".2f")],
        )
    )
    lost = ", ".join(
        f"the {comparison.model_name(row)} {record['clean']:.2f} to {record['mean']:.2f} %" for row, record in wholes
    )
    says = f"From the images as they are to the mean of {len(corruptions)} corruptions, on {on}: {lost}."
    return Section("robustness", "Robustness", says, parts, records)


def _record(model: str, output: str, values: Any) -> dict[str, Any] | None:
    """Accuracies of one output in percent: by corruption, a value for each severity, the first for images as they
    are; None where it was not measured.
    """
    images = values["images"]
    accuracy = {
        name: [100 * count / images for count in correct[output]]
        for name, correct in values["correct"].items()
        if output in correct
    }
    if not accuracy:
        return None
    clean = next(iter(accuracy.values()))[0]
    corrupted = mean(mean(levels[1:]) for levels in accuracy.values())
    return {"model": model, "images": images, "clean": clean, "mean": corrupted, "accuracy": accuracy}


def _chart(comparison: Comparison, wholes: list[tuple[Row, dict[str, Any]]], corruption: str) -> Chart:
    chart = Chart("severity", "right (%)", size=(4.7, 2.6))
    for row, record in wholes:
        name, levels = comparison.model_name(row), record["accuracy"].get(corruption, [])
        chart.line(
            range(len(levels)),
            levels,
            [f"{name}, {corruption} {level}: {value:.2f} %" for level, value in enumerate(levels)],
            color=comparison.colour(row.run, row.model),
            marker=comparison.marker(row.run, row.model),
            label=name,
        )
    chart.axes.set_ylim(0, 102)
    chart.legend()
    return chart
