"""The report as files: HTML in one piece, Markdown with its curves as SVG, and JSON, all with the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from distill.errors import InputError
from distill.report import tables
from distill.report.comparison import Comparison, Row
from distill.report.curves import Curve
from distill.report.plots import loss_figure, to_svg, to_svg_file, top1_figure
from distill.text_files import write_text

TEMPLATES = Path(__file__).parent / "templates"


class ReportFigure(NamedTuple):
    """One plot of the report."""

    name: str
    """For file names and ids."""
    title: str
    caption: str
    plot: Figure


def write_report(comparison: Comparison, html: Path) -> list[Path]:
    """Write `html` and, beside it, the same as .md, .json and one .svg a plot; each appears whole or not at all.

    Raises:
        InputError: `html` does not end in .html or is a folder.
    """
    if html.suffix != ".html" or html.is_dir():
        raise InputError(f"{html}: give the report a file name that ends in .html.")
    figures = list(_figures(comparison))
    images = {html.with_name(f"{html.stem}-{figure.name}.svg"): figure for figure in figures}
    plots = "".join(f"\n![{figure.title}]({quote(path.name)})\n\n{figure.caption}\n" for path, figure in images.items())
    texts = {
        html: render_html(comparison, figures),
        html.with_suffix(".md"): tables.render_markdown(comparison) + plots,
        html.with_suffix(".json"): json.dumps(to_json(comparison), indent=2, allow_nan=False) + "\n",
        **{path: to_svg_file(figure.plot) for path, figure in images.items()},
    }
    html.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def render_html(comparison: Comparison, figures: list[ReportFigure]) -> str:
    """One file without a script that asks the network for nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        header=tables.header(comparison),
        body=tables.body(comparison),
        numeric=tables.numeric_columns(comparison),
        caption=tables.caption(comparison),
        figures=[(figure, to_svg(figure.plot, figure.name)) for figure in figures],
        recipes={
            name: yaml.safe_dump(dict(run.recipe), sort_keys=False)
            for name, run in comparison.runs.items()
            if run.recipe
        },
        environments={
            name: json.dumps(run.environment, indent=2) for name, run in comparison.runs.items() if run.environment
        },
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The report's numbers as plain data; accuracies in percent, beside the counts they come from."""
    curves = comparison.curves
    return {
        "runs": {name: str(run.path) for name, run in comparison.runs.items()},
        "test_images": comparison.samples,
        "k": comparison.k,
        "warnings": list(comparison.warnings),
        "rows": [_row(row) for row in comparison.rows],
        "curves": {"loss": [_curve(curve) for curve in curves.loss], "top1": [_curve(curve) for curve in curves.top1]},
    }


def _row(row: Row) -> dict[str, Any]:
    metrics = row.metrics
    return {
        "run": row.run,
        "model": row.model,
        "head": row.head,
        "top1": metrics.top1,
        "top1_correct": metrics.top1_correct,
        "topk": metrics.topk,
        "topk_correct": metrics.topk_correct,
        # JSON has no infinity, which is what a probability of 0 for the label comes to.
        "nll": metrics.nll if math.isfinite(metrics.nll) else None,
        "agreement": metrics.agreement,
        "agreements": metrics.agreements,
        "parameters": row.parameters,
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "run": curve.run,
        "model": curve.model,
        "variant": curve.variant,
        "epochs": list(curve.epochs),
        "values": list(curve.values),
    }


def _figures(comparison: Comparison) -> Iterator[ReportFigure]:
    curves = comparison.curves
    if curves.loss:
        caption = (
            "Mean training loss of each epoch. Student and control minimise different losses, each on its own scale."
        )
        yield ReportFigure("loss", "Training loss", caption, loss_figure(curves))
    if curves.top1:
        caption = "Accuracy of the fused heads after each epoch, on the split that checkpoints are chosen on."
        if curves.teacher:
            caption += " Dashed: the teacher."
        yield ReportFigure("top1", "Accuracy", caption, top1_figure(curves))
