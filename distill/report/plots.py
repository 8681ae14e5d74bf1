"""Curves as SVG. Inline, text stays text, and what is not data takes the page's colour."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill.report.curves import Curve, Curves

# Okabe and Ito's palette: told apart by colour-blind readers, and on white as on black. One colour a run and model.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TEACHER_COLOUR = "#808080"
# Stands in for the page's text colour, which matplotlib does not know.
INK = "#010203"

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    # The name of a run is a name, also where it has dollar signs in it.
    "text.parse_math": False,
}


def loss_figure(curves: Curves) -> Figure:
    """Training loss over epochs."""
    figure, axes = _figure("training loss")
    _draw(axes, curves.loss)
    return figure


def top1_figure(curves: Curves) -> Figure:
    """Accuracy over epochs, with the teacher's as a horizontal line."""
    figure, axes = _figure("top-1 (%)")
    several = len({curve.run for curve in curves.top1}) > 1
    for curve in curves.teacher:
        axes.axhline(curve.values[-1], color=TEACHER_COLOUR, linestyle="--", label=_label(curve, several))
    _draw(axes, curves.top1)
    return figure


def to_svg(figure: Figure, prefix: str) -> Markup:
    """An <svg> element; `prefix` keeps its ids apart from those of the page's other figures."""
    svg = _svg(figure, prefix, transparent=True)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    # Scaled by the page's width, not fixed in points.
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)))


def to_svg_file(figure: Figure) -> str:
    """A file of its own, on white: it knows of no page."""
    return _svg(figure, "file", transparent=False)


def _svg(figure: Figure, salt: str, *, transparent: bool) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    return buffer.getvalue()


def _figure(label: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _draw(axes: Axes, curves: tuple[Curve, ...]) -> None:
    several = len({curve.run for curve in curves}) > 1
    colours: dict[tuple[str, str], str] = {}
    with mpl.rc_context(STYLE):
        for curve in curves:
            colour = colours.setdefault((curve.run, curve.model), COLOURS[len(colours) % len(COLOURS)])
            axes.plot(
                curve.epochs,
                curve.values,
                color=colour,
                linestyle=":" if curve.variant.endswith("EMA") else "-",
                # A run of one epoch is a point; a line alone would draw nothing.
                marker="o" if len(curve.epochs) < 30 else "",
                markersize=4,
                label=_label(curve, several),
            )
        axes.legend()


def _label(curve: Curve, several: bool) -> str:
    return f"{curve.model}{f' of {curve.run}' if several else ''}{f' ({curve.variant})' if curve.variant else ''}"
