"""Calibration: whether the models are as often right as they say."""

from __future__ import annotations

from distill.report.calibration import Calibration, calibration
from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.page import Cell, Plot, Section, Table, number
from distill.report.sections.learning import colour

LINES = {None: "-", "fused": "-", "cls": "--", "dist": ":"}


def build(comparison: Comparison) -> Section | None:
    found = []
    for row in comparison.rows:
        analysis = row.source.analysis
        # A teacher may have been trained on the images that are held out from the student: nothing is fitted on them.
        validation = None if analysis is None or row.model == "teacher" else analysis.validation(row.output)
        found.append((row, calibration(row.logits, comparison.labels, validation)))
    plot = Plot(
        "reliability",
        "Reliability",
        "Share of right answers by the probability that the model gives its answer. Below the diagonal: too sure.",
        _chart(comparison, found),
    )
    data = [
        {
            "model": comparison.name(row),
            "ece": values.ece,
            "temperature": values.temperature,
            "ece_fitted": values.ece_fitted,
            "nll_fitted": values.nll_fitted,
            "bins": [[each.samples, each.confidence, each.accuracy] for each in values.bins],
        }
        for row, values in found
    ]
    return Section("calibration", "Calibration", _says(comparison, found), [plot, _table(comparison, found)], data)


def _says(comparison: Comparison, found: list[tuple[Row, Calibration]]) -> str:
    wholes = [(comparison.model_name(row), values) for row, values in found if row.is_whole]
    says = ", ".join(f"{name} {values.ece:.2f}" for name, values in wholes)
    says = f"Expected calibration error in percentage points: {says}"
    fitted = [f"{name} {values.ece_fitted:.2f}" for name, values in wholes if values.ece_fitted is not None]
    return says + (f"; with a temperature fitted on the validation split: {', '.join(fitted)}." if fitted else ".")


def _chart(comparison: Comparison, found: list[tuple[Row, Calibration]]) -> Chart:
    chart = Chart(size=(4.7, 4.4))
    axes = chart.axes[0]
    axes.plot([0, 100], [0, 100], color="#808080", linewidth=0.8, linestyle="-", alpha=0.6)
    for row, values in found:
        if not row.is_whole:
            continue
        name = comparison.model_name(row)
        chart.line(
            [100 * each.confidence for each in values.bins],
            [100 * each.accuracy for each in values.bins],
            [
                f"{name}: {100 * each.accuracy:.1f} % of {each.samples:,} right, {100 * each.confidence:.1f} % sure"
                for each in values.bins
            ],
            color=colour(comparison, row.run, row.model),
            linestyle=LINES[row.head],
            label=name,
        )
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_aspect("equal")
    chart.label("probability of the answer (%)", "right (%)")
    chart.legend(loc="upper left")
    return chart


def _table(comparison: Comparison, found: list[tuple[Row, Calibration]]) -> Table:
    header = ["model", "ECE", "NLL"]
    fitted = any(values.temperature is not None for _, values in found)
    if fitted:
        header += ["temperature", "ECE with it", "NLL with it"]
    rows = []
    for row, values in found:
        cells = [Cell(comparison.name(row)), number(values.ece, ".2f"), number(row.metrics.nll, ".4f")]
        if fitted:
            cells += [
                number(values.temperature, ".3f"),
                number(values.ece_fitted, ".2f"),
                number(values.nll_fitted, ".4f"),
            ]
        rows.append(cells)
    caption = "Expected calibration error over 15 bins of equal width, in percentage points."
    if fitted:
        caption += (
            " The temperature that the logits are divided by minimises the NLL on the validation split; a teacher has "
            "none, since it may have been trained on that split."
        )
    return Table("calibration", caption, header, rows, span=2)
