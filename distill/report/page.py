"""What a report is made of, before it is HTML, Markdown or JSON: sections of plots, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distill.report.charts import Chart

Column = tuple[str, str, str | Callable[[Any], str]]
"""A column's header, the key of its values in each record, and their form, for `cell`."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    sort: float | None = None
    """What a column is sorted by, if not by the text."""
    heat: float | None = None
    """Share of the strongest colour, 0 to 1."""
    good: bool | None = None
    """Whether a change is one for the better."""

    @property
    def key(self) -> str:
        return str(self.text if self.sort is None else self.sort)


def cell(value: Any, form: str | Callable[[Any], str] = "", *, good: bool | None = None) -> Cell:
    """A value by a format specification or a function; empty where it is not known."""
    if value is None:
        return Cell("")
    text = form(value) if callable(form) else format(value, form)
    return Cell(text, value if isinstance(value, int | float) else None, good=good)


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
    kind = "table"

    @classmethod
    def of(
        cls, name: str, caption: str, records: Sequence[Mapping[str, Any]], columns: Sequence[Column], **more: Any
    ) -> Table:
        """A line for each record. Columns without a form are words and come first; those without a value are left out.

        Args:
            more: fields of the table.
        """
        filled = [column for column in columns if any(record.get(column[1]) is not None for record in records)]
        rows = [[cell(record.get(key), form) for _, key, form in filled] for record in records]
        words = sum(form == "" for _, _, form in filled)
        return cls(name, caption, [header for header, _, _ in filled], rows, words, **more)


@dataclass(frozen=True)
class Plot:
    name: str
    """For file names and ids."""
    title: str
    caption: str
    chart: Chart
    filed: bool = False
    """Also a file beside the Markdown."""
    kind = "plot"


@dataclass(frozen=True)
class Picture:
    source: str
    """A data: address."""
    label: str
    """The right class."""
    answers: Sequence[tuple[str, str, float, bool]]
    """Of each model: its name, its answer, the probability in percent, and whether it is right."""
    group: str
    number: int
    """Its index in the test set."""


@dataclass(frozen=True)
class Wall:
    """Pictures that a reader can filter by group and by class."""

    name: str
    title: str
    groups: Sequence[str]
    pictures: Sequence[Picture]
    kind = "wall"


class Neighbour(NamedTuple):
    source: str
    """A data: address."""
    label: str
    cosine: float
    right: bool
    """Whether it has the class of the test image."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Test images, each with the training images nearest to it."""

    name: str
    title: str
    pictures: Sequence[tuple[Picture, Sequence[Neighbour]]]
    kind = "neighbourhoods"


@dataclass(frozen=True)
class Attention:
    """Pictures as each token of each block sees them."""

    name: str
    title: str
    pictures: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[tuple[str, str]]]]]]
    """(data: address, caption, [(token, [(block, data: address)])])."""
    kind = "attention"


@dataclass(frozen=True)
class Listing:
    """Long text as it is in a file, folded."""

    title: str
    text: str
    kind = "listing"


Part = Table | Plot | Wall | Neighbourhoods | Attention | Listing


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    says: str
    """One sentence: what it shows."""
    parts: Sequence[Part]
    data: Any
    """The same numbers for report.json."""
