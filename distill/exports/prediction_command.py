"""`distill predict`: which images its arguments mean, and answers on a console, as CSV or as JSON."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.console import console, say, track
from distill.data.images import SUFFIXES
from distill.errors import InputError
from distill.exports.prediction import BATCH, Answer, LoadedStudent, answers
from distill.files.text import visible


def export_folder(path: Path) -> Path:
    """The export in a run directory, or the folder itself."""
    return path / "export" if (path / "status.json").is_file() and (path / "export").is_dir() else path


def images_of(arguments: Sequence[str]) -> Iterator[str | Image.Image]:
    """Files as they are, the image files anywhere in folders, and those that patterns match, by name; '-': standard
    input, one image or a path a line.

    Raises:
        InputError: a folder or a pattern has no images, or standard input is empty.
    """
    for argument in arguments:
        if argument == "-":
            yield from _standard_input()
        elif os.path.isdir(argument):
            yield from _found(argument, (path for path in Path(argument).rglob("*") if path.is_file()))
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            yield from _found(argument, map(Path, glob.iglob(argument, recursive=True)))
        else:
            yield argument


def _found(argument: str, paths: Iterator[Path]) -> list[str]:
    found = sorted(str(path) for path in paths if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{argument}: no image files there ({', '.join(sorted(SUFFIXES))}).")
    return found


def _standard_input() -> list[str | Image.Image]:
    content = sys.stdin.buffer.read()
    try:
        return [Image.open(BytesIO(content))]
    except Exception as error:  # of Pillow, where a list of paths begins like a format's header
        if b"\0" in content:
            raise InputError(f"-: neither an image that can be read ({error}) nor a list of paths.") from None
        paths = [line for line in os.fsdecode(content).splitlines() if line]
    if not paths:
        raise InputError("-: standard input is empty; it takes an image, or a path a line.")
    return list(paths)


def predict(student: LoadedStudent, arguments: Sequence[str], *, form: str | None, top: int, batch: int = BATCH) -> int:
    """Print an answer for each image; an image without one costs a line. Returns how many have none.

    Args:
        form: 'csv' or 'json' (a JSON object a line); None: for a person.
    """
    images = list(images_of(arguments))
    write = {None: _show, "csv": _csv_writer(min(top, len(student.labels))), "json": _print_json}[form]
    found, problems = answers(student, images, top=top, batch=batch), 0
    if len(images) > batch and not console.is_terminal:  # else the answers themselves show how far it is
        found = track(found, "predicting", len(images), Console(stderr=True))
    for answer in found:
        if answer.problem is not None:
            problems += 1
            print(f"error: {visible(answer.problem)}", file=sys.stderr)
        write(answer)
    return problems


def _show(answer: Answer) -> None:
    if answer.problem is None:
        say(answer.image)
        console.print(table(answer.classes))


def _print_json(answer: Answer) -> None:
    classes = [{"class": label, "probability": round(share, 6)} for label, share in answer.classes]
    problem = {} if answer.problem is None else {"problem": answer.problem}
    print(json.dumps({"image": answer.image, "classes": classes, **problem}, ensure_ascii=False))


def _csv_writer(top: int) -> Callable[[Answer], None]:
    """Prints the header at the first answer."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = [name for rank in range(1, top + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    header = ["image", *columns, "problem"]

    def write(answer: Answer) -> None:
        if header:
            writer.writerow(header)
            header.clear()
        cells = [cell for label, share in answer.classes for cell in (label, f"{share:.6f}")]
        writer.writerow([answer.image, *(cells or [""] * len(columns)), answer.problem or ""])

    return write


def table(classes: Sequence[tuple[str, float]]) -> Table:
    """The classes of one answer, for a console."""
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    has_bars = console.encoding.startswith("utf")  # their characters
    for label, share in classes:
        bar = Bar(1.0, 0.0, share, width=30) if has_bars else Text("#" * round(30 * share))
        shown.add_row(f"{100 * share:6.2f} %", bar, Text(visible(label)))
    return shown
