"""A comparison as text: its table on the console, and the whole of it in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table as ConsoleTable

from distill.files.text import markdown
from distill.report.answer import answer, main_table
from distill.report.comparison import Comparison, Row
from distill.report.page import Plot, Section, Table


def header(comparison: Comparison) -> list[str]:
    names = ["model", "top-1 %", f"top-{comparison.k} %", "NLL", "agreement %", "parameters"]
    return ["run", *names] if comparison.several else names


def caption(comparison: Comparison) -> str:
    return (
        f"{comparison.samples:,} test images. NLL: negative log-likelihood of the labels, in nats. "
        "Agreement: share of images on which the teacher decides the same."
    )


def render_console(comparison: Comparison) -> ConsoleTable:
    """The figures that fit into 80 columns for one run, and before them, what a reader must know."""
    warnings = [f"[bold red]Warning. {escape(text)}[/]" for text in comparison.warnings]
    lines = [*warnings, escape(answer(comparison)), escape(caption(comparison))]
    table = ConsoleTable(caption="\n".join(lines), caption_justify="left")
    for index, name in enumerate(header(comparison)):
        table.add_column(name, justify="left" if index < 1 + comparison.several else "right")
    previous = None
    for row in comparison.rows:
        if previous is not None and (row.run, row.model) != previous:
            table.add_section()
        previous = row.run, row.model
        table.add_row(*map(escape, [*([row.run] if comparison.several else []), *_cells(row)]))
    return table


def render_markdown(comparison: Comparison, shown: Sequence[Section], images: Mapping[str, str]) -> str:
    """Everything but pictures, most plots and whole recipes; `images`: addresses of plots that are files, by name."""
    blocks = [f"# Comparison: {', '.join(map(markdown, comparison.runs))}"]
    blocks += [f"> **Warning.** {markdown(text)}" for text in comparison.warnings]
    table = main_table(comparison)
    blocks += [markdown(answer(comparison)), _markdown_table(table), markdown(table.caption)]
    for section in shown:
        blocks += [f"## {section.title}", markdown(section.says)]
        for part in section.parts:
            if isinstance(part, Table):
                blocks += [_markdown_table(part), markdown(part.caption)]
            elif isinstance(part, Plot) and part.name in images:
                blocks += [f"![{part.title}]({images[part.name]})", markdown(part.caption)]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    rules = [":---" if index < table.text_columns else "---:" for index in range(len(table.header))]
    lines = [[markdown(name) for name in table.header], rules]
    lines += [[markdown(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
