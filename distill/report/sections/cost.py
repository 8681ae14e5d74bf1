"""Cost: accuracy against size, operations and time; training time."""

from __future__ import annotations

from typing import Any

from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.page import Column, Part, Plot, Section, Table
from distill.report.runs import Record
from distill.report.standing import standings

AXES = (
    ("parameters", "parameters (M)", 1e-6, "parameters"),
    ("gflops", "GFLOPs an image", 1.0, "FLOPs"),
    ("latency_ms", "latency of one image (ms)", 1.0, "time for one image"),
)
"""What accuracy is drawn against: its key in `Comparison.costs`, the axis, its unit, and its name in a sentence."""
BESIDES = ("compilation", "evaluation", "analysis")


def build(comparison: Comparison) -> Section | None:
    found = [(row, comparison.costs(row)) for row in comparison.wholes]
    parts: list[Part] = []
    for key, label, unit, _ in AXES:
        # Speeds that were measured at another time are no points of the same chart.
        drawn = [(row, costs) for row, costs in found if key != "latency_ms" or not costs["measured_apart"]]
        known = [(row, costs) for row, costs in drawn if costs[key] is not None]
        if len(known) > 1:
            caption = "Up and left is better: more right answers for less."
            if apart := [comparison.model_name(row) for row, costs in found if (row, costs) not in drawn]:
                caption += f" Without {', '.join(apart)}: measured apart."
            chart = _chart(comparison, known, key, label, unit)
            parts.append(Plot(f"cost-{key}", f"Accuracy by {label.split(' (')[0]}", caption, chart))
    trained = [
        {
            "model": comparison.called(name, model),
            "machine": _machine(files.environment),
            "training_seconds": files.training_seconds,
            **{f"{part}_seconds": files.seconds.get(part) or None for part in BESIDES},
        }
        for name, run in comparison.runs.items()
        for model, files in run.models
    ]
    if any(training["training_seconds"] for training in trained):
        columns: list[Column] = [
            ("model", "model", ""),
            ("machine", "machine", ""),
            ("training", "training_seconds", duration),
            *((part, f"{part}_seconds", duration) for part in BESIDES),
        ]
        caption = (
            "Time of the training steps and of the rest, without the pauses before a resumption. Where a run recorded "
            "training alone, it has the evaluations too."
        )
        parts.append(Table.of("training", caption, trained, columns))
    if not parts:
        return None
    data = {
        "models": [{"model": comparison.model_name(row), **costs} for row, costs in found],
        "training": trained,
    }
    return Section("cost", "Cost", _says(comparison), parts, data)


def _says(comparison: Comparison) -> str:
    said = []
    for student in standings(comparison):
        ratios = [f"{student.ratios[key]:.2f} times the {what}" for key, _, _, what in AXES if key in student.ratios]
        if ratios:
            whose = f"the student of {student.called}" if comparison.several else "the student"
            said.append(f"{whose} needs {', '.join(ratios)} of {student.its_teacher}")
    if not said:
        return "What the models and their training cost."
    return f"{said[0][0].upper()}{'; '.join(said)[1:]}."


def _chart(comparison: Comparison, found: list[tuple[Row, dict[str, Any]]], key: str, label: str, unit: float) -> Chart:
    chart = Chart(label, "top-1 (%)", size=(4.7, 2.6))
    for row, costs in found:
        name, value = comparison.model_name(row), unit * costs[key]
        chart.line(
            [value],
            [row.metrics.top1],
            [f"{name}: {row.metrics.top1:.2f} % at {value:.4g} {label}"],
            color=comparison.colour(row.run, row.model),
            marker=comparison.marker(row.run, row.model),
            markersize=7,
            linestyle="",
            label=name,
        )
    chart.axes.margins(0.15, 0.2)
    chart.axes.set_xlim(left=0)
    chart.legend()
    return chart


def _machine(environment: Record) -> str | None:
    device, processes = environment.get("device_name"), environment.get("processes")
    return f"{processes} x {device}" if device and processes and processes > 1 else device


def duration(seconds: float) -> str:
    """'1 h 02 min', '3 min 04 s' or '5.6 s'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
