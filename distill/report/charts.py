"""Charts as SVG: drawn by matplotlib, with what a mark says when it is pointed at.

Inline, text stays text, and what is not data takes the page's colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and on white as on black. One colour a run and model.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TEACHER_COLOUR = "#808080"
# Stands in for the page's text colour, which matplotlib does not know.
INK = "#010203"
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    # The name of a run is a name, also where it has dollar signs in it.
    "text.parse_math": False,
    # Every point that a reader can point at stays a point.
    "path.simplify": False,
}


MOST_WITHIN = 4
"""Lines of a legend within the axes."""
LONG_LABEL = 20
LEGEND_LINE = 0.21
"""Inches."""


def short(name: str, most: int = 36) -> str:
    """A name that leaves room for the chart: its beginning and its end."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[len(name) - most + most // 3 + 1 :]}"


class Chart:
    """A figure of one or more axes, and the texts of its marks."""

    def __init__(self, rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (4.7, 3.2), **more: Any) -> None:
        with mpl.rc_context(STYLE):
            self.figure = Figure(figsize=size, layout="constrained")
            self.axes: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False, **more).flat)
        self._tips: dict[str, list[str]] = {}

    def line(self, x: Sequence[float], y: Sequence[float], tips: Sequence[str], *, axes: int = 0, **style: Any) -> None:
        """A line through marks, each of which says its tip; `style` as matplotlib has it."""
        # Where there are many, the marks are there to be pointed at, but not to be seen.
        dense = len(x) > 40
        style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6, **style}
        if "label" in style:
            style["label"] = short(style["label"])
        with mpl.rc_context(STYLE):
            if dense:
                self.axes[axes].plot(x, y, **{**style, "marker": ""})
                style |= {"linestyle": "", "alpha": 0.0, "label": None}
            (drawn,) = self.axes[axes].plot(x, y, **style)
        self._name(drawn, tips)

    def bars(
        self, places: Sequence[float], widths: Sequence[float], tips: Sequence[str], *, left: Sequence[float],
        axes: int = 0, **style: Any,
    ) -> None:  # fmt: skip
        """Horizontal bars; those of no width are left out."""
        first = True
        with mpl.rc_context(STYLE):
            for place, width, tip, start in zip(places, widths, tips, left, strict=True):
                (drawn,) = self.axes[axes].barh(
                    [place], [width], left=[start], height=0.62, **(style if first else {**style, "label": None})
                )
                first = False
                self._name(drawn, [tip])

    def legend(self, axes: int = 0, **more: Any) -> None:
        """In the axes; one of many lines stands below them, where it hides none."""
        handles, labels = self.axes[axes].get_legend_handles_labels()
        if len(labels) <= MOST_WITHIN:
            with mpl.rc_context(STYLE):
                self.axes[axes].legend(**more)
            return
        columns = 1 if max(map(len, labels)) > LONG_LABEL else 2
        width, height = self.figure.get_size_inches()
        self.figure.set_size_inches(width, height + LEGEND_LINE * math.ceil(len(labels) / columns))
        with mpl.rc_context(STYLE):
            self.figure.legend(handles, labels, loc="outside lower center", ncols=columns)

    def legend_below(self, axes: int = 0, columns: int = 3) -> None:
        """One legend for all axes, under them."""
        handles, labels = self.axes[axes].get_legend_handles_labels()
        if len(labels) > 1:
            with mpl.rc_context(STYLE):
                self.figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))

    def label(self, x: str, y: str, axes: int = 0, *, title: str = "") -> None:
        with mpl.rc_context(STYLE):
            self.axes[axes].set_xlabel(x)
            self.axes[axes].set_ylabel(y)
            self.axes[axes].set_title(title)

    def to_svg(self, prefix: str) -> Markup:
        """An <svg> element for the page; `prefix` keeps its ids apart from those of other charts."""
        root = ElementTree.fromstring(_svg(self.figure, prefix, transparent=True))
        for element in list(root):
            if element.tag == f"{SVG}metadata":
                root.remove(element)
        for name, tips in self._tips.items():
            group = next(element for element in root.iter() if element.get("id") == name)
            marks = list(group.iter(f"{SVG}use")) or list(group.iter(f"{SVG}path"))
            for mark, tip in zip(marks, tips, strict=False):
                mark.set("data-tip", tip)
        for element in root.iter():
            if (target := element.attrib.pop(XLINK, None)) is not None:
                element.set("href", target)
            element.tag = element.tag.removeprefix(SVG)
        for name in ("width", "height"):  # scaled by the page's width, not fixed in points
            del root.attrib[name]
        root.set("role", "img")
        svg = ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")
        for colour in (*COLOURS, TEACHER_COLOUR):
            svg = svg.replace(colour, css_colour(colour))
        return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg))

    def to_svg_file(self) -> str:
        """A file of its own, on white: it knows of no page."""
        return _svg(self.figure, "file", transparent=False)

    def _name(self, artist: Any, tips: Sequence[str]) -> None:
        name = f"marks-{len(self._tips)}"
        artist.set_gid(name)
        self._tips[name] = list(tips)


def css_colour(colour: str) -> str:
    """The page's own shade of a colour, which it chooses by its background; the colour itself elsewhere."""
    return f"var(--c{colour.removeprefix('#')}, {colour})"


def _svg(figure: Figure, salt: str, *, transparent: bool) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    return buffer.getvalue()
