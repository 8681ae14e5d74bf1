"""Calibration: whether the models are as often right as they say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.metrics import Floats, Ints, as_numbers, decisions, mean_nll
from distill.report.page import Column, Part, Plot, Section, Table

BINS = 15
LARGEST_TEMPERATURE = 20.0
COLUMNS: list[Column] = [
    ("model", "model", ""),
    ("ECE", "ece", ".2f"),
    ("NLL", "nll", ".4f"),
    ("temperature", "temperature", ".3f"),
    ("ECE with it", "ece_fitted", ".2f"),
    ("NLL with it", "nll_fitted", ".4f"),
]


class Bin(NamedTuple):
    """Images whose answer has about the same probability."""

    samples: int
    confidence: float
    """Mean probability of the answer."""
    accuracy: float
    """Share of right answers; both in [0, 1]."""


class Calibration(NamedTuple):
    bins: list[Bin]
    """15 of equal width, empty ones left out, by rising confidence."""
    ece: float
    """Expected calibration error in percentage points (Guo et al. 2017, arXiv 1706.04599)."""
    temperature: float | None = None
    """By which the logits are divided to minimise the NLL on the validation split; None without one."""
    ece_fitted: float | None = None
    """On the test set, with that temperature."""
    nll_fitted: float | None = None


def calibration(logits: Floats, labels: Ints, validation: tuple[Floats, Ints] | None = None) -> Calibration:
    """Of logits [N, classes] on the test set; the temperature from `validation`, its logits and labels."""
    bins, ece = reliability(logits, labels)
    if validation is None:
        return Calibration(bins, ece)
    temperature = fit_temperature(*validation)
    scaled = as_numbers(logits) / temperature
    return Calibration(bins, ece, temperature, reliability(scaled, labels)[1], mean_nll(scaled, labels))


def reliability(logits: Floats, labels: Ints) -> tuple[list[Bin], float]:
    """Bins and ECE; a confidence on the border of two bins belongs to the lower one."""
    confidence, right = softmax(as_numbers(logits), axis=1).max(1), decisions(logits) == labels
    indices = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [
        Bin(int(where.sum()), float(confidence[where].mean()), float(right[where].mean()))
        for where in (indices == index for index in np.unique(indices))
    ]
    return bins, 100 * sum(each.samples * abs(each.accuracy - each.confidence) for each in bins) / len(labels)


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Between 1/20 and 20, where the mean NLL of logits / temperature is smallest; it has one minimum."""
    exact, bound = as_numbers(logits), float(np.log(LARGEST_TEMPERATURE))
    found = minimize_scalar(
        lambda log_t: mean_nll(exact / np.exp(log_t), labels),
        bounds=(-bound, bound),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(found.x))


def build(comparison: Comparison) -> Section | None:
    found = []
    for row in comparison.rows:
        if row.by_neighbours:  # shares of votes are no probabilities that anything was trained to give
            continue
        analysis = row.source.analysis
        # A teacher may have been trained on the images that are held out from the student: nothing is fitted on them.
        validation = None if analysis is None or row.model == "teacher" else analysis.validation(row.output)
        found.append((row, calibration(row.logits, comparison.labels, validation)))
    if all(row.model == "teacher" for row, _ in found):
        return None
    records = [{"model": comparison.name(row), "nll": row.metrics.nll, **values._asdict()} for row, values in found]
    caption = "Expected calibration error over 15 bins of equal width, in percentage points."
    if any(values.temperature is not None for _, values in found):
        caption += (
            " The temperature that the logits are divided by minimises the NLL on the validation split; a teacher has "
            "none, since it may have been trained on that split."
        )
    parts: list[Part] = [
        Plot(
            "reliability",
            "Reliability",
            "Share of right answers by the probability that the model gives its answer. Below the diagonal: too sure.",
            _chart(comparison, found),
        ),
        Table.of("calibration", caption, records, COLUMNS, span=2),
    ]
    wholes = [(comparison.model_name(row), values) for row, values in found if row.is_whole]
    says = ", ".join(f"{name} {values.ece:.2f}" for name, values in wholes)
    fitted = ", ".join(f"{name} {values.ece_fitted:.2f}" for name, values in wholes if values.ece_fitted is not None)
    says = f"Expected calibration error in percentage points: {says}"
    says += f"; with a temperature fitted on the validation split: {fitted}." if fitted else "."
    return Section("calibration", "Calibration", says, parts, records)


def _chart(comparison: Comparison, found: list[tuple[Row, Calibration]]) -> Chart:
    chart = Chart("probability of the answer (%)", "right (%)", size=(4.7, 4.2))
    chart.axes.plot([0, 100], [0, 100], color="#808080", linewidth=0.8, linestyle="-", alpha=0.6)
    for row, values in found:
        if row.is_whole:
            name = comparison.model_name(row)
            chart.line(
                [100 * each.confidence for each in values.bins],
                [100 * each.accuracy for each in values.bins],
                [
                    f"{name}: {100 * each.accuracy:.1f} % of {each.samples:,} right, {100 * each.confidence:.1f} % sure"
                    for each in values.bins
                ],
                color=comparison.colour(row.run, row.model),
                marker=comparison.marker(row.run, row.model),
                label=name,
            )
    chart.axes.set(xlim=(0, 102), ylim=(0, 102))
    chart.legend()
    return chart
