"""Learning curves: loss and its parts, accuracy per head, learning rate, speed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from distill.report.charts import COLOURS, TEACHER_COLOUR, Chart, css_colour, short
from distill.report.comparison import HEAD_NAMES, Comparison, Row
from distill.report.curves import Curve
from distill.report.page import Plot, Section

STYLES = ("-", "--", ":", "-.")


def build(comparison: Comparison) -> Section | None:
    curves = comparison.curves
    plots = []
    if curves.top1:
        caption = "Accuracy of the fused heads after each epoch, on the split that checkpoints are chosen on."
        if comparison.teachers:
            # What it was trained on may hold the validation split: the weights of public teachers have seen all images.
            caption += " Dashed: the teacher on the test images."
        plots.append(Plot("top1", "Accuracy", caption, top1_chart(comparison), filed=True))
    if curves.heads:
        plots.append(
            Plot("heads", "Heads", "The same of each head alone.", _chart(comparison, curves.heads, "top-1 (%)"))
        )
    if curves.loss:
        caption = "Mean training loss of each epoch."
        if len({curve.model for curve in curves.loss}) > 1:
            caption += " Student and control minimise different losses, each on its own scale."
        plots.append(Plot("loss", "Training loss", caption, loss_chart(comparison), filed=True))
    if len({curve.variant for curve in curves.parts}) > 1:
        caption = "Its parts by themselves, without their weights."
        plots.append(Plot("parts", "Parts of the loss", caption, _chart(comparison, curves.parts, "loss")))
    if curves.rate:
        caption = "Learning rate, mean of each epoch."
        plots.append(Plot("rate", "Learning rate", caption, _chart(comparison, curves.rate, "learning rate")))
    if curves.speed:
        caption = "Images per second in training, with everything that it waits for."
        plots.append(Plot("speed", "Speed of training", caption, _chart(comparison, curves.speed, "images/s")))
    if not plots:
        return None
    return Section("learning", "Learning curves", _says(curves.top1, comparison.several), plots, None)


def _says(top1: Sequence[Curve], several: bool) -> str:
    """Where the best of each model was, as checkpoints are chosen: the first of equals, raw weights before EMA."""
    found = []
    for run, model in dict.fromkeys((curve.run, curve.model) for curve in top1):
        curves = [curve for curve in top1 if (curve.run, curve.model) == (run, model)]
        points = [
            (value, -epoch, not curve.variant.endswith("EMA"))
            for curve in curves
            for epoch, value in zip(curve.epochs, curve.values, strict=True)
        ]
        best, when, raw = max(points)
        last = curves[0].epochs[-1]
        late = " and was still rising" if len(curves[0].epochs) > 2 and -when == last else ""
        name = f"{model} of {run}" if several else model
        average = "" if raw else ", moving average"
        found.append(f"{name} was best after epoch {-when:g} of {last:g} ({best:.2f} %{average}){late}")
    if not found:
        return "How the training went, epoch by epoch."
    return f"On the split that checkpoints are chosen on, the {'; the '.join(found[:4])}."


def loss_chart(comparison: Comparison) -> Chart:
    """Training loss over epochs."""
    return _chart(comparison, comparison.curves.loss, "training loss")


def top1_chart(comparison: Comparison) -> Chart:
    """Accuracy over epochs, with the teacher's on the test images as a horizontal line."""
    chart = _lines(comparison, comparison.curves.top1, "top-1 (%)")
    for row in comparison.teachers:
        label = short(f"teacher{f' of {row.run}' if comparison.several else ''} (test)")
        chart.axes[0].axhline(row.metrics.top1, color=TEACHER_COLOUR, linestyle="--", label=label)
    chart.legend()
    return chart


def _chart(comparison: Comparison, curves: Sequence[Curve], label: str) -> Chart:
    chart = _lines(comparison, curves, label)
    if len(curves) > 1:
        chart.legend()
    return chart


def _lines(comparison: Comparison, curves: Sequence[Curve], label: str) -> Chart:
    chart = Chart()
    chart.label("epoch", label)
    chart.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    variants = list(dict.fromkeys(curve.variant.removesuffix(", EMA") for curve in curves))
    for curve in curves:
        name = _label(curve, comparison.several)
        style = STYLES[variants.index(curve.variant.removesuffix(", EMA")) % len(STYLES)]
        chart.line(
            curve.epochs,
            curve.values,
            [
                f"{name}, epoch {epoch:g}: {_figure(value)}"
                for epoch, value in zip(curve.epochs, curve.values, strict=True)
            ],
            color=colour(comparison, curve.run, curve.model),
            linestyle=":" if curve.variant.endswith("EMA") else style,
            label=name,
        )
    return chart


def colour(comparison: Comparison, run: str, model: str) -> str:
    """Of a model in every chart."""
    if model == "teacher":
        return TEACHER_COLOUR
    models = list(dict.fromkeys((row.run, row.model) for row in comparison.rows if row.model != "teacher"))
    return COLOURS[models.index((run, model)) % len(COLOURS)]


def key_of(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Models and their colours, for a panel."""
    return [(comparison.model_name(row), css_colour(colour(comparison, row.run, row.model))) for row in rows]


def _label(curve: Curve, several: bool) -> str:
    variant = HEAD_NAMES.get(curve.variant, curve.variant)
    return f"{curve.model}{f' of {curve.run}' if several else ''}{f' ({variant})' if variant else ''}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.4g}"
