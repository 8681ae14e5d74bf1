"""What a person sees of a run: a progress display on a terminal, plain lines elsewhere; one process speaks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.files.text import visible

console = Console(highlight=False)
_log = logging.getLogger("distill")


def say(text: str) -> None:
    """Print a line as it is, whatever brackets names from recipes and paths have in them."""
    console.print(visible(text), soft_wrap=True, markup=False, emoji=False)


def _made_visible(record: logging.LogRecord) -> bool:
    """Files are named in the log, and a file's name may be anything."""
    record.msg, record.args = visible(record.getMessage()), None
    return True


class _OnFullDisk(logging.Handler):
    """A full disk costs lines of the log, and not a stack trace for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class LogFile(_OnFullDisk, logging.FileHandler):
    """`train.log`."""


class _LogStream(_OnFullDisk, logging.StreamHandler):
    """Standard output, which may lead to a file."""


def set_up_logging(*, is_main: bool) -> None:
    """Send the project's log to the console of the main process, and silence the others below errors. A program that
    handles its log itself goes on doing so.
    """
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
        # What the progress display shows already goes to the run's log file alone.
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
        """Steps done so far."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The means of the last logging interval."""
        parts = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key.startswith("loss"))
        text = f"epoch {step / self._steps_per_epoch:.2f}  {parts}  {values['images_per_second']:.0f} img/s"
        if self._live:
            self._progress.update(self._task, text=f"{text}  {self._accuracy}")
        _log.info("step %d  %s", step, text, extra={"displayed": self._live})

    def accuracy(self, text: str) -> None:
        """The newest evaluation, kept in view."""
        self._accuracy = text
        _log.info(text)
