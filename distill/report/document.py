"""The report as files: HTML in one piece, Markdown with its curves as SVG, and JSON, all with the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.errors import InputError
from distill.files.text import write_text
from distill.report.answer import answer, main_table
from distill.report.comparison import Comparison
from distill.report.page import Plot, Section
from distill.report.sections import sections
from distill.report.summary import summarise
from distill.report.tables import render_markdown

TEMPLATES = Path(__file__).parent / "templates"
OPENED = 2
"""Sections that are not folded, the first ones."""
FIRST_PICTURES = 12
"""Pictures of a wall, before a reader asks for more."""


def write_report(comparison: Comparison, html: Path, before: Sequence[Section] = ()) -> list[Path]:
    """Write `html` and, beside it, the same as .md, .json and the learning curves as .svg; each appears whole or not at
    all.

    Args:
        before: sections that come before those on the runs.

    Raises:
        InputError: `html` does not end in .html or is a folder.
    """
    check_name(html)
    shown = [*before, *sections(comparison)]
    filed = [part for section in shown for part in section.parts if isinstance(part, Plot) and part.filed]
    images = {plot.name: html.with_name(f"{html.stem}-{plot.name}.svg") for plot in filed}
    addresses = {name: quote(path.name) for name, path in images.items()}
    texts = {
        html: render_html(comparison, shown),
        html.with_suffix(".md"): render_markdown(comparison, shown, addresses),
        html.with_suffix(".json"): json.dumps(to_json(comparison, shown), indent=2, allow_nan=False) + "\n",
        **{images[plot.name]: plot.chart.to_svg_file() for plot in filed},
    }
    html.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def check_name(html: Path) -> None:
    """Raise InputError unless a report can have this name."""
    if html.suffix != ".html" or html.is_dir():
        raise InputError(f"{html}: give the report a file name that ends in .html.")


def render_html(comparison: Comparison, shown: list[Section]) -> str:
    """One file that asks the network for nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        summary=summarise(comparison),
        warnings=comparison.warnings,
        answer=answer(comparison),
        table=main_table(comparison),
        sections=shown,
        opened=OPENED,
        first_pictures=FIRST_PICTURES,
    )


def to_json(comparison: Comparison, shown: list[Section]) -> dict[str, Any]:
    """The report's numbers as plain data."""
    curves = {kind: [curve._asdict() for curve in comparison.curves[kind]] for kind in ("loss", "top1", "macro", "knn")}
    data = {
        "runs": {name: str(run.path) for name, run in comparison.runs.items()},
        "test_images": comparison.samples,
        "k": comparison.k,
        "warnings": comparison.warnings,
        "summary": summarise(comparison).record(),
        "answer": answer(comparison),
        "rows": [comparison.record(row) for row in comparison.rows],
        "curves": curves,
        **{section.name: section.data for section in shown if section.data is not None},
    }
    finite: dict[str, Any] = _finite(data)
    return finite


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is what a probability of 0 for the label comes to: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
