"""Learning curves: loss and its parts, accuracy per head, learning rate, speed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from distill.report.charts import TEACHER_COLOUR, Chart, short
from distill.report.comparison import HEAD_NAMES, Comparison
from distill.report.curves import Curve
from distill.report.page import Plot, Section
from distill.report.roles import STUDENT

STYLES = ("-", "--", ":", "-.")
PLOTS = {
    "top1": (
        "Accuracy",
        "top-1 (%)",
        "Accuracy of the fused heads after each epoch, on the split that checkpoints are chosen on.",
    ),
    "macro": (
        "Macro accuracy",
        "macro accuracy (%)",
        "The mean of the accuracies of the classes after each epoch, by which checkpoints were chosen.",
    ),
    "heads": ("Heads", "top-1 (%)", "The same of each head alone."),
    "knn": (
        "Nearest neighbours",
        "k-NN (%)",
        "Accuracy of the nearest training images by the student's features after each epoch, on the split that "
        "checkpoints are chosen on.",
    ),
    "entropy": (
        "Entropy of the teacher's answers",
        "entropy (nats)",
        "Mean entropy of the answers of the moving-average teacher. Collapsed answers have 0 throughout, or the "
        "logarithm of the number of prototypes.",
    ),
    "kl": ("Distance from the teacher", "KL (nats)", "KL of the teacher's answers to the student's; 0 in a collapse."),
    "loss": ("Training loss", "training loss", "Mean training loss of each epoch."),
    "parts": ("Parts of the loss", "loss", "Its parts by themselves, without their weights."),
    "rate": ("Learning rate", "learning rate", "Learning rate, mean of each epoch."),
    "speed": ("Speed of training", "images/s", "Images per second in training, with everything that it waits for."),
}
"""By what the curves show: title, label of the axis, caption."""


def build(comparison: Comparison) -> Section | None:
    plots = []
    for kind, (title, _, caption) in PLOTS.items():
        curves = comparison.curves[kind]
        if not curves or (kind == "parts" and len({curve.variant for curve in curves}) == 1):
            continue
        if kind == "top1" and comparison.teachers:
            # What it was trained on may hold the validation split: the weights of public teachers have seen all images.
            caption += (
                f" Dashed: {_listed([comparison.model_name(row) for row in comparison.teachers])} on the test images."
            )
        if kind == "loss" and len({curve.model for curve in curves}) > 1:
            caption += " Student and control minimise different losses, each on its own scale."
        plots.append(Plot(kind, title, caption, draw(comparison, kind), filed=kind in ("top1", "macro", "knn", "loss")))
    if not plots:
        return None
    macro = comparison.curves["macro"]
    by_macro = {(curve.run, curve.model) for curve in macro}
    top1 = [curve for curve in comparison.curves["top1"] if (curve.run, curve.model) not in by_macro]
    chosen_by = [*top1, *macro, *_selecting_neighbours(comparison)]
    return Section("learning", "Learning curves", _says(comparison, chosen_by), plots, None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _selecting_neighbours(comparison: Comparison) -> list[Curve]:
    """Curves of nearest neighbours by which checkpoints were chosen: those of runs without a classifier."""
    chosen = {(row.run, row.model) for row in comparison.wholes if row.by_neighbours}
    return [curve for curve in comparison.curves["knn"] if (curve.run, curve.model) in chosen]


def _says(comparison: Comparison, top1: Sequence[Curve]) -> str:
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
        name = _name(comparison, run, model)
        average = "" if raw else ", moving average"
        found.append(f"{name} was best after epoch {-when:g} of {last:g} ({best:.2f} %{average}){late}")
    if not found:
        return "How the training went, epoch by epoch."
    return f"On the split that checkpoints are chosen on, the {'; the '.join(found[:4])}."


def draw(comparison: Comparison, kind: str) -> Chart:
    """Curves over epochs; under the accuracy, the teacher's on the test images as a horizontal line."""
    curves, (_, label, _) = comparison.curves[kind], PLOTS[kind]
    chart = Chart("epoch", label)
    chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    variants = list(dict.fromkeys(curve.variant.removesuffix(", EMA") for curve in curves))
    for curve in curves:
        name = _label(comparison, curve)
        style = STYLES[variants.index(curve.variant.removesuffix(", EMA")) % len(STYLES)]
        points = zip(curve.epochs, curve.values, strict=True)
        chart.line(
            curve.epochs,
            curve.values,
            [f"{name}, epoch {epoch:g}: {_figure(value)}" for epoch, value in points],
            color=comparison.colour(curve.run, curve.model),
            marker=comparison.marker(curve.run, curve.model),
            linestyle=":" if curve.variant.endswith("EMA") else style,
            label=name,
        )
    for row in comparison.teachers if kind == "top1" else ():
        name = short(f"{comparison.model_name(row)} (test)")
        chart.axes.axhline(row.metrics.top1, color=TEACHER_COLOUR, linestyle="--", label=name)
    chart.legend()
    return chart


def _label(comparison: Comparison, curve: Curve) -> str:
    variant = HEAD_NAMES.get(curve.variant, curve.variant)
    return f"{_name(comparison, curve.run, curve.model)}{f' ({variant})' if variant else ''}"


def _name(comparison: Comparison, run: str, model: str) -> str:
    called = comparison.roles[run] if model == STUDENT else model
    return f"{called} of {run}" if comparison.several else called


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.4g}"
