"""A comparison as text: its table on the console, and the whole of it in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.markup import escape
from rich.table import Table as ConsoleTable

from distill.files.text import markdown
from distill.report.answer import answer, main_records, main_table
from distill.report.comparison import Comparison
from distill.report.page import Plot, Section, Table
from distill.report.summary import summarise


def console_table(table: Table) -> ConsoleTable:
    """A report's table for the console, without its caption."""
    shown = ConsoleTable()
    for index, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if index < table.text_columns else "right", overflow="fold")
    for cells in table.rows:
        shown.add_row(*(escape(cell.text) for cell in cells))
    return shown


def render_console(comparison: Comparison) -> ConsoleTable:
    """The figures that fit into 80 columns for one run, and before them, what a reader must know."""
    table = main_table(comparison, narrow=True)
    warnings = [f"[bold red]Warning. {escape(text)}[/]" for text in comparison.warnings]
    shown = console_table(table)
    told = summarise(comparison).verdict
    lines = [*warnings, f"[bold]{escape(told)}[/]", escape(answer(comparison)), escape(table.caption)]
    shown.caption, shown.caption_justify = "\n".join(lines), "left"
    models = [(record["run"], record["model"]) for record in main_records(comparison)]
    for line, (model, following) in zip(shown.rows, pairwise(models), strict=False):
        line.end_section = model != following
    return shown


def render_markdown(comparison: Comparison, shown: Sequence[Section], images: Mapping[str, str]) -> str:
    """Everything but pictures, most plots and whole recipes; `images`: addresses of plots that are files, by name."""
    summary, table = summarise(comparison), main_table(comparison)
    blocks = [f"# {markdown(summary.title)}"]
    blocks += [f"> **Warning.** {markdown(text)}" for text in comparison.warnings]
    blocks += [markdown(summary.asked), f"**{markdown(summary.verdict)}**", _markdown_table(summary.table())]
    blocks += ["\n".join(f"- {name}: {markdown(text)}" for name, text in summary.facts.items())]
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
