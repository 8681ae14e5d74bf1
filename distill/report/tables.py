"""A comparison as rows of text: on the console, in Markdown and, for the page, as they are."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from distill.report.comparison import Comparison, Row
from distill.text_files import markdown


def header(comparison: Comparison) -> list[str]:
    names = ["model", "top-1 %", f"top-{comparison.k} %", "NLL", "agreement %", "parameters"]
    return ["run", *names] if _several(comparison) else names


def body(comparison: Comparison) -> list[list[str]]:
    """One line a row; what is unknown stays empty."""
    return [[row.run, *_cells(row)] if _several(comparison) else _cells(row) for row in comparison.rows]


def caption(comparison: Comparison) -> str:
    return (
        f"{comparison.samples:,} test images. NLL: negative log-likelihood of the labels, in nats. "
        "Agreement: share of images on which the teacher decides the same."
    )


def numeric_columns(comparison: Comparison) -> range:
    return range(2 if _several(comparison) else 1, len(header(comparison)))


def render_console(comparison: Comparison) -> Table:
    """The table for a terminal, warnings included; one run's fits into 80 columns."""
    warnings = [f"[bold red]Warning. {escape(text)}[/]" for text in comparison.warnings]
    table = Table(caption="\n".join([*warnings, escape(caption(comparison))]), caption_justify="left")
    for index, name in enumerate(header(comparison)):
        table.add_column(name, justify="right" if index in numeric_columns(comparison) else "left")
    previous = None
    for row, cells in zip(comparison.rows, body(comparison), strict=True):
        if previous is not None and (row.run, row.model) != previous:
            table.add_section()
        previous = row.run, row.model
        table.add_row(*map(escape, cells))
    return table


def render_markdown(comparison: Comparison) -> str:
    names = header(comparison)
    rules = ["---:" if index in numeric_columns(comparison) else ":---" for index in range(len(names))]
    table = "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in (names, rules, *body(comparison)))
    warnings = "".join(f"> **Warning.** {markdown(text)}\n\n" for text in comparison.warnings)
    return f"# Comparison: {', '.join(map(markdown, comparison.runs))}\n\n{warnings}{table}\n\n{caption(comparison)}\n"


def _several(comparison: Comparison) -> bool:
    return len(comparison.runs) > 1


def _cells(row: Row) -> list[str]:
    metrics = row.metrics
    return [
        row.label,
        f"{metrics.top1:.2f}",
        f"{metrics.topk:.2f}",
        f"{metrics.nll:.4f}",
        "" if metrics.agreement is None else f"{metrics.agreement:.2f}",
        "" if row.parameters is None else f"{row.parameters:,}",
    ]
