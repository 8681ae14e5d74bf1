"""Cost: accuracy against size, operations and time; training time and energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distill.report.charts import Chart
from distill.report.comparison import Comparison, Row
from distill.report.page import Cell, Panel, Part, Section, Table, number
from distill.report.sections.learning import colour, key_of


@dataclass(frozen=True)
class Costs:
    """Of one model; None: not known."""

    parameters: int | None
    gflops: float | None
    images_per_second: float | None
    latency_ms: float | None
    megabytes: float | None
    joules_per_image: float | None


def costs_of(comparison: Comparison, row: Row) -> Costs:
    """A control has those of its student, the same network, which was measured in turns with the teacher."""
    run = comparison.runs[row.run]
    values = run.costs("teacher" if row.model == "teacher" else "student")

    def scaled(key: str, factor: float = 1.0) -> float | None:
        value = values.get(key)
        return None if value is None else value * factor

    return Costs(
        parameters=row.parameters,
        gflops=scaled("flops", 1e-9),
        images_per_second=scaled("images_per_second"),
        latency_ms=scaled("latency_seconds", 1e3),
        megabytes=scaled("bytes", 1e-6),
        joules_per_image=scaled("joules_per_image"),
    )


AXES: tuple[tuple[str, str, Callable[[Costs], float | None]], ...] = (
    ("parameters (M)", ".3f", lambda costs: None if costs.parameters is None else costs.parameters / 1e6),
    ("GFLOPs an image", ".4f", lambda costs: costs.gflops),
    ("latency of one image (ms)", ".2f", lambda costs: costs.latency_ms),
)


def build(comparison: Comparison) -> Section | None:
    found = [(row, costs_of(comparison, row)) for row in comparison.wholes]
    axes = [axis for axis in AXES if sum(axis[2](costs) is not None for _, costs in found) > 1]
    parts: list[Part] = []
    if axes:
        caption = "Up and left is better: more right answers for less."
        shown = [row for row, _ in found]
        parts.append(Panel("accuracy-cost", caption, _charts(comparison, found, axes), key_of(comparison, shown)))
    training = _training(comparison)
    if training is not None:
        parts.append(training)
    if not parts:
        return None
    data = [
        {
            "model": comparison.model_name(row),
            "parameters": costs.parameters,
            "gflops": costs.gflops,
            "images_per_second": costs.images_per_second,
            "latency_ms": costs.latency_ms,
            "megabytes": costs.megabytes,
            "joules_per_image": costs.joules_per_image,
        }
        for row, costs in found
    ]
    times = [
        {"model": name, "training_seconds": seconds, "training_joules": joules}
        for name, _, seconds, joules in _trained(comparison)
    ]
    return Section("cost", "Cost", _says(comparison, found), parts, {"models": data, "training": times})


def _says(comparison: Comparison, found: list[tuple[Row, Costs]]) -> str:
    name = next(iter(comparison.runs))
    by_model = {row.model: costs for row, costs in found if row.run == name or row.model == "teacher"}
    student, teacher = by_model.get("student"), by_model.get("teacher")
    said = []
    if student is not None and teacher is not None:
        for what, one, other in (
            ("parameters", student.parameters, teacher.parameters),
            ("FLOPs", student.gflops, teacher.gflops),
            ("time for one image", student.latency_ms, teacher.latency_ms),
        ):
            if one is not None and other:
                said.append(f"{one / other:.2f} times the {what}")
    if said:
        whose = f"The student of {name}" if comparison.several else "The student"
        return f"{whose} has {', '.join(said[:-1])}{' and ' if said[:-1] else ''}{said[-1]} of its teacher."
    trained = [f"{name} {_duration(seconds)}" for name, _, seconds, _ in _trained(comparison) if seconds]
    return f"Training took: {', '.join(trained)}." if trained else "What the models cost."


def _charts(
    comparison: Comparison,
    found: list[tuple[Row, Costs]],
    axes: list[tuple[str, str, Callable[[Costs], float | None]]],
) -> list[tuple[str, Chart]]:
    charts = []
    for label, form, value_of in axes:
        chart = Chart(size=(3.1, 2.3))
        largest = 0.0
        for row, costs in found:
            value = value_of(costs)
            if value is None:
                continue
            largest = max(largest, value)
            chart.line(
                [value],
                [row.metrics.top1],
                [f"{comparison.model_name(row)}: {row.metrics.top1:.2f} % at {value:{form}} {label}"],
                color=colour(comparison, row.run, row.model),
                marker="D" if row.model == "teacher" else "o",
                markersize=7,
                linestyle="",
            )
        chart.axes[0].set_xlim(0, 1.15 * largest)
        chart.axes[0].margins(y=0.2)
        chart.label(label, "top-1 (%)")
        charts.append((f"by {label.split(' (')[0]}", chart))
    return charts


def _trained(comparison: Comparison) -> list[tuple[str, str, float | None, float | None]]:
    """(model, machine, seconds, joules) of every training."""
    return [
        (
            f"{name}: {model}" if comparison.several else model,
            _machine(part.environment),
            part.training_seconds,
            part.training_joules,
        )
        for name, run in comparison.runs.items()
        for model, part in (("student", run), ("control", run.control))
        if part is not None
    ]


def _machine(environment: object) -> str:
    values = environment if isinstance(environment, dict) else {}
    device, processes = values.get("device_name"), values.get("processes")
    return "" if not device else f"{processes} x {device}" if processes and processes > 1 else str(device)


def _training(comparison: Comparison) -> Table | None:
    trained = _trained(comparison)
    if not any(seconds for _, _, seconds, _ in trained):
        return None
    energy = any(joules is not None for *_, joules in trained)
    header = ["model", "machine", "training", *(["energy kWh"] if energy else [])]
    rows = []
    for name, machine, seconds, joules in trained:
        cells = [Cell(name), Cell(machine), Cell("" if seconds is None else _duration(seconds), seconds)]
        rows.append([*cells, number(None if joules is None else joules / 3.6e6, ".4f")] if energy else cells)
    caption = "Time of the training with its evaluations; pauses between an interruption and its resumption left out."
    return Table("training", caption, header, rows, text_columns=2)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {whole % 60:02} s"
        if minutes
        else f"{seconds:.1f} s"
    )
