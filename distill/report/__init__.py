"""The comparison report: reads run directories, never models, so that it can be made again wherever the files are."""

from distill.report.comparison import Comparison, Row, compare
from distill.report.document import write_report
from distill.report.metrics import Metrics
from distill.report.tables import render_console, render_markdown

__all__ = ["Comparison", "Metrics", "Row", "compare", "render_console", "render_markdown", "write_report"]
