"""What a report is made of, before it is HTML, Markdown or JSON: sections of plots, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.report.charts import Chart


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    sort: float | str | None = None
    """What a column is sorted by, if not by the text; None with an empty text: last."""
    heat: float | None = None
    """Share of the strongest colour, 0 to 1."""
    good: bool | None = None
    """Whether a change is one for the better."""

    @property
    def key(self) -> str:
        return str(self.text if self.sort is None else self.sort)


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    """The first ones, which are words; the others are numbers."""
    folded: bool = False
    """Behind a line that opens it: what most readers pass over."""
    span: int = 3
    """Of a page's three columns, where it has as many."""
    matrix: bool = False
    """A grid of small coloured cells instead of lines to be sorted."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Plot:
    name: str
    """For file names and ids."""
    title: str
    caption: str
    chart: Chart
    filed: bool = False
    """Also a file beside the Markdown."""
    kind: str = field(default="plot", init=False)


@dataclass(frozen=True)
class Panel:
    """Small charts of the same models, with one key for all."""

    name: str
    caption: str
    charts: Sequence[tuple[str, Chart]]
    """(title, chart)."""
    key: Sequence[tuple[str, str]]
    """(model, colour)."""
    kind: str = field(default="panel", init=False)


@dataclass(frozen=True)
class Answer:
    """What one model says of a picture."""

    model: str
    label: str
    probability: float
    """In percent."""
    right: bool


@dataclass(frozen=True)
class Picture:
    source: str
    """A data: address."""
    label: str
    """The right class."""
    answers: Sequence[Answer]
    group: str
    number: int
    """Its place in the test set."""


@dataclass(frozen=True)
class Wall:
    """Pictures that a reader can filter by group and by class."""

    name: str
    groups: Sequence[str]
    classes: Sequence[str]
    pictures: Sequence[Picture]
    kind: str = field(default="wall", init=False)


@dataclass(frozen=True)
class Box:
    """An area over the patches, in units of patches."""

    left: int
    top: int
    width: int
    height: int
    weight: float


@dataclass(frozen=True)
class View:
    """One picture as one token of one block sees it."""

    title: str
    source: str
    boxes: Sequence[Box]


@dataclass(frozen=True)
class Attention:
    """Pictures under the attention of the prefix tokens: rows of views by picture and token."""

    name: str
    title: str
    grid: tuple[int, int]
    """Patches (height, width)."""
    pictures: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[View]]]]]
    """(data: address, caption, [(token, its views by block)])."""
    kind: str = field(default="attention", init=False)


@dataclass(frozen=True)
class Listing:
    """Long text as it is in a file, folded."""

    title: str
    text: str
    kind: str = field(default="listing", init=False)


Part = Table | Plot | Panel | Wall | Attention | Listing


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    says: str
    """One sentence: what it shows."""
    parts: Sequence[Part]
    data: Any
    """The same numbers for report.json."""


def number(value: float | None, form: str, **more: Any) -> Cell:
    """A cell of one number, empty where it is not known."""
    return Cell("") if value is None else Cell(format(value, form), value, **more)
