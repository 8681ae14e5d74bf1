"""Console output: a progress display on a terminal, plain lines elsewhere; main process only."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column

from distill.files.regular import regular
from distill.files.text import visible
from distill.launching.launcher import is_main_process

T = TypeVar("T")
WIDE = 120
"""Characters of a terminal from which on there is room for the parts of the loss."""
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


class Stages:
    """What a launch does, one after the other, such as: teacher, student, control, analysis."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names, self.done = list(names), 0
        self.later_steps = 0
        """Training steps of the stages after the current one, as far as known."""

    def label(self, name: str) -> str:
        """'2 of 4: student'; the name alone where there is nothing else."""
        return f"{self.done + 1} of {len(self.names)}: {name}" if len(self.names) > 1 else name


_shown: list[Progress] = []
"""The bars that are on the terminal now; rich has one such display at a time."""


def track(items: Iterable[T], what: str, total: int, on: Console | None = None) -> Iterator[T]:
    """Yield the items, with a bar of their own while they last, on the terminal of the main process."""
    with busy(what, total, on) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def busy(what: str, total: int | None = None, on: Console | None = None) -> Iterator[Callable[[], None]]:
    """A bar on the terminal of the main process, below that of training if there is one; gives a function that moves
    it one of `total` steps on. Without a total it only shows that something is done.

    `on`: another console than standard output.
    """
    on = on or console
    if not on.is_terminal or not is_main_process():
        yield lambda: None
        return
    own = None if _shown else Progress(*_columns(on.width), console=on, transient=True)
    bars = own or _shown[-1]
    task = bars.add_task("", total=total, label=what, text="")
    if own is not None:
        _shown.append(own)
        own.start()
    try:
        yield lambda: bars.advance(task)
    finally:
        bars.remove_task(task)
        if own is not None:
            own.stop()
            _shown.remove(own)


def _columns(width: int) -> list[ProgressColumn]:
    """That fit 80 characters."""
    wide = width >= WIDE
    return [
        TextColumn("[bold]{task.fields[label]}"),
        BarColumn(bar_width=24 if wide else 8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
    ]


class TrainingDisplay:
    """Stage, step, time left, loss, newest accuracy and images/s, and parts of the loss where there is room; drawn at
    the logging interval, and when an accuracy is measured.
    """

    def __init__(
        self, name: str, *, total_steps: int, steps_per_epoch: int, is_main: bool, later_steps: int = 0
    ) -> None:
        """`later_steps`: of the stages after this one, for the time left; taken to be as fast."""
        self._steps_per_epoch, self._total, self._later = steps_per_epoch, total_steps, later_steps
        self._accuracy, self._step = "", 0
        self._values: dict[str, float] = {}
        self._live = console.is_terminal and is_main
        self._progress = Progress(*_columns(console.width), console=console, disable=not self._live)
        self._task = self._progress.add_task("", total=total_steps, text="", label=name)
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        if self._live:
            _shown.append(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._live:
            _shown.remove(self._progress)

    def advance(self, step: int) -> None:
        """Set the number of finished steps."""
        self._began = self._began or (time.monotonic(), step)
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the means of the last logging interval."""
        self._step, self._values = step, dict(values)
        parts = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key.startswith("loss"))
        text = f"epoch {step / self._steps_per_epoch:.2f}  {parts}  {values['images_per_second']:.0f} img/s"
        left = self._time_left()
        _log.info("step %d  %s%s", step, text, f"  {left} left" if left else "", extra={"displayed": self._live})
        self._draw()

    def accuracy(self, text: str, value: str) -> None:
        """Log the newest evaluation, and show its `value`."""
        self._accuracy = value
        _log.info(text)
        self._draw()

    def _draw(self) -> None:
        if not self._live:
            return
        shown = [f"{left} left"] if (left := self._time_left()) else []
        if self._values:
            names = ["loss"] if console.width < WIDE else [key for key in self._values if key.startswith("loss")]
            shown += [f"{name.removeprefix('loss/')} {self._values[name]:.3f}" for name in names]
        shown += [self._accuracy] if self._accuracy else []
        shown += [f"{self._values['images_per_second']:.0f}/s"] if self._values else []
        self._progress.update(self._task, text="  ".join(shown))

    def _time_left(self) -> str:
        """Of this stage and those after it."""
        if self._began is None or self._step <= self._began[1]:
            return ""
        each = (time.monotonic() - self._began[0]) / (self._step - self._began[1])
        minutes, seconds = divmod(round(each * (self._total - self._step + self._later)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
