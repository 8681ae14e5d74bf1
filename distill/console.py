"""Console output: a progress display on a terminal, plain lines elsewhere; main process only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.files.regular import regular
from distill.files.text import visible

WIDTH = 200
"""In characters, of what goes to a file or a pipe: there rich would take 80 and cut numbers."""
console = Console(highlight=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = WIDTH
_log = logging.getLogger("distill")


def say(text: str) -> None:
    """Print a line without interpreting markup in it."""
    console.print(visible(text), soft_wrap=True, markup=False, emoji=False)


def _made_visible(record: logging.LogRecord) -> bool:
    """Escape unprintable characters of log records, for example in file names."""
    record.msg, record.args = visible(record.getMessage()), None
    return True


class _OnFullDisk(logging.Handler):
    """Drops log lines on a full disk, without stack traces."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class LogFile(_OnFullDisk, logging.FileHandler):
    """`train.log`. A link is not followed: OSError."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=regular)


class _LogStream(_OnFullDisk, logging.StreamHandler):
    """Standard output, which may be a file."""


def set_up_logging(*, is_main: bool) -> None:
    """Log to the console on the main process, and only errors on the others. Existing handlers are kept."""
    _log.setLevel(logging.INFO if is_main else logging.ERROR)
    _log.addFilter(_made_visible)
    if not _log.hasHandlers():
        _log.propagate = False
        handler: logging.Handler
        if console.is_terminal:
            handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
        else:
            handler = _LogStream(console.file)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        # What the progress display shows is written to the run's log file only.
        handler.addFilter(lambda record: not getattr(record, "displayed", False))
        _log.addHandler(handler)


class TrainingDisplay:
    """Epoch, loss parts, accuracy, images/s and time left, updated at the logging interval."""

    def __init__(self, name: str, *, total_steps: int, steps_per_epoch: int, is_main: bool) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._accuracy = ""
        self._live = console.is_terminal and is_main
        self._progress = Progress(
            TextColumn("[bold]{task.fields[label]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=total_steps, text="", label=name)

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Set the number of finished steps."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the means of the last logging interval."""
        parts = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key.startswith("loss"))
        text = f"epoch {step / self._steps_per_epoch:.2f}  {parts}  {values['images_per_second']:.0f} img/s"
        if self._live:
            self._progress.update(self._task, text=f"{text}  {self._accuracy}")
        _log.info("step %d  %s", step, text, extra={"displayed": self._live})

    def accuracy(self, text: str) -> None:
        """Show the newest evaluation."""
        self._accuracy = text
        _log.info(text)
