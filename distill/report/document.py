"""The report as files: HTML in one piece, Markdown with its curves as SVG, and JSON, all with the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.errors import InputError
from distill.files.text import write_text
from distill.report.answer import answer, main_table
from distill.report.comparison import Comparison, Row
from distill.report.curves import Curve
from distill.report.page import Plot, Section
from distill.report.sections import sections
from distill.report.sections.cost import costs_of
from distill.report.tables import render_markdown

TEMPLATES = Path(__file__).parent / "templates"


def write_report(comparison: Comparison, html: Path) -> list[Path]:
    """Write `html` and, beside it, the same as .md, .json and the learning curves as .svg; each appears whole or not at
    all.

    Raises:
        InputError: `html` does not end in .html or is a folder.
    """
    if html.suffix != ".html" or html.is_dir():
        raise InputError(f"{html}: give the report a file name that ends in .html.")
    shown = sections(comparison)
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
        title=", ".join(comparison.runs),
        warnings=comparison.warnings,
        answer=answer(comparison),
        table=main_table(comparison),
        sections=shown,
    )


def to_json(comparison: Comparison, shown: list[Section]) -> dict[str, Any]:
    """The report's numbers as plain data; accuracies in percent, beside the counts they come from."""
    curves = comparison.curves
    data = {
        "runs": {name: str(run.path) for name, run in comparison.runs.items()},
        "test_images": comparison.samples,
        "k": comparison.k,
        "warnings": list(comparison.warnings),
        "answer": answer(comparison),
        "rows": [_row(comparison, row) for row in comparison.rows],
        "curves": {"loss": [_curve(curve) for curve in curves.loss], "top1": [_curve(curve) for curve in curves.top1]},
        **{section.name: section.data for section in shown if section.data is not None},
    }
    finite: dict[str, Any] = _finite(data)
    return finite


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    metrics, costs = row.metrics, costs_of(comparison, row)
    return {
        "run": row.run,
        "model": row.model,
        "head": row.head,
        "top1": metrics.top1,
        "top1_correct": metrics.top1_correct,
        "top1_interval": list(row.top1_interval),
        "topk": metrics.topk,
        "topk_correct": metrics.topk_correct,
        "nll": metrics.nll,
        "agreement": metrics.agreement,
        "agreements": metrics.agreements,
        "parameters": row.parameters,
        "gflops": costs.gflops,
        "images_per_second": costs.images_per_second,
        "latency_ms": costs.latency_ms,
        "megabytes": costs.megabytes,
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "run": curve.run,
        "model": curve.model,
        "variant": curve.variant,
        "epochs": list(curve.epochs),
        "values": list(curve.values),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is what a probability of 0 for the label comes to: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
