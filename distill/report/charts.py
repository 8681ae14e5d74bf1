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
# Nobody has to tell colours apart: one shape a run and model. There are seven, so that both come again together late.
MARKERS = ("o", "s", "^", "v", "P", "X", "h")
TEACHER_MARKER = "D"
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

DENSE = 40
"""Marks of a line from which on all are there to be pointed at, but only a few to be seen."""
SEEN = 8
"""Marks of such a line."""
COORDINATES, DIGITS = {"d", "x", "y"}, 2
"""Attributes of coordinates, and their digits behind the decimal point, in points."""
LEGEND_WIDTH = 58
"""Characters, eight of them for a mark."""
LEGEND_LINE = 0.21
"""Inches."""


def short(name: str, most: int = 36) -> str:
    """A name that leaves room for the chart: its beginning and its end."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[len(name) - most + most // 3 + 1 :]}"


class Chart:
    """A pair of axes, and the texts of its marks."""

    def __init__(self, x: str, y: str, *, size: tuple[float, float] = (4.7, 3.2)) -> None:
        with mpl.rc_context(STYLE):
            self.figure = Figure(figsize=size, layout="constrained")
            self.axes: Axes = self.figure.subplots()
        self.axes.set(xlabel=x, ylabel=y)
        self._tips: list[Sequence[str]] = []

    def line(self, x: Sequence[float], y: Sequence[float], tips: Sequence[str], *, label: str, **style: Any) -> None:
        """A line through marks, each of which says its tip; `style` as matplotlib has it."""
        style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6, "label": short(label), **style}
        with mpl.rc_context(STYLE):
            if len(x) > DENSE:
                self.axes.plot(x, y, **style, markevery=max(1, len(x) // SEEN))
                style |= {"linestyle": "", "alpha": 0.0, "label": None}
            self.axes.plot(x, y, **style, gid=f"marks-{len(self._tips)}")
        self._tips.append(tips)

    def legend(self) -> None:
        """Below the axes, where it hides nothing; none for a single line."""
        handles, labels = self.axes.get_legend_handles_labels()
        if len(labels) > 1:
            columns = max(1, LEGEND_WIDTH // (8 + max(map(len, labels))))
            width, height = self.figure.get_size_inches()
            self.figure.set_size_inches(width, height + LEGEND_LINE * math.ceil(len(labels) / columns))
            with mpl.rc_context(STYLE):
                self.figure.legend(handles, labels, loc="outside lower center", ncols=columns)

    def to_svg(self, prefix: str, title: str) -> Markup:
        """An <svg> element for the page; `prefix` keeps its ids apart from those of other charts."""
        root = ElementTree.fromstring(_svg(self.figure, prefix, transparent=True))
        for index, tips in enumerate(self._tips):
            group = next(element for element in root.iter() if element.get("id") == f"marks-{index}")
            marks = list(group.iter(f"{SVG}use")) or list(group.iter(f"{SVG}path"))
            for mark, tip in zip(marks, tips, strict=False):
                mark.set("data-tip", tip)
        for element in root.iter():
            if (target := element.attrib.pop(XLINK, None)) is not None:
                element.set("href", target)
            for name in COORDINATES & element.attrib.keys():
                element.set(
                    name, re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.{DIGITS}f}", element.get(name, ""))
                )
            element.tag = element.tag.removeprefix(SVG)
        for name in ("width", "height"):  # scaled by the page's width, not fixed in points
            del root.attrib[name]
        root.set("role", "img")
        root.set("aria-label", title)
        svg = ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")
        for colour in (*COLOURS, TEACHER_COLOUR):  # the page has its own shade of each, by its background
            svg = svg.replace(colour, f"var(--c{colour.removeprefix('#')}, {colour})")
        return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg))

    def to_svg_file(self) -> str:
        """A file of its own, on white: it knows of no page."""
        return _svg(self.figure, "file", transparent=False)


def _svg(figure: Figure, salt: str, *, transparent: bool) -> str:
    buffer = io.StringIO()
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata=without)
    return buffer.getvalue()
