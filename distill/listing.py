"""`distill runs` and `distill show`: run directories by what they have recorded. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.live import Live
from rich.table import Table
from rich.text import Text

from distill import run
from distill.commandline import recorded_command
from distill.console import console
from distill.errors import InputError
from distill.files.metrics import read_lines
from distill.files.plain_data import read_resolved
from distill.files.text import visible

NO_RUNS = frozenset({"checkpoints", "export"})
"""Folders of a run directory in which no runs are looked for."""
ACCURACIES = ("student/top1", "student/knn")
SHORT = {"validation": "val", "test": "test"}
REFRESH = 2.0
"""Seconds."""


class Listed(NamedTuple):
    """One run."""

    path: Path
    state: str
    """'killed' if it is recorded as running and no process holds it; 'unreadable'."""
    age: str
    """Since its status was written."""
    epoch: str
    accuracy: str
    """In percent, on the test images or the newest on the selection split."""
    teacher: str
    parameters: str
    """Of the student."""


def runs_under(folder: Path) -> Iterator[Path]:
    """Run directories at `folder` and anywhere below, controls and teachers among them, by name."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NO_RUNS)
        if "status.json" in files and "resolved.yaml" in files:
            yield Path(place)


def listed(path: Path) -> Listed:
    """What there is to say of the run at `path`; never raises for damaged files."""
    try:
        status, state = run.read_status(path), run.state_of(path) or "unknown"
    except InputError:
        return Listed(path, "unreadable", "", "", "", "", "")
    raw = _recipe_of(path)
    epochs = (raw.get("train") or {}).get("epochs")
    done = f"{status.get('epoch', 0):.4g}" + (f" of {epochs}" if epochs else "")
    count = (status.get("parameters") or {}).get("student")
    return Listed(
        path,
        state,
        _age(status.get("updated")),
        done,
        _accuracy(path, status),
        _teacher(raw.get("teacher")),
        "" if count is None else f"{count / 1e6:.2f} M",
    )


def _recipe_of(path: Path) -> dict[str, Any]:
    try:
        return read_resolved(path) or {}
    except InputError:
        return {}


def _age(updated: str | None) -> str:
    try:
        seconds = time.time() - datetime.fromisoformat(updated or "").timestamp()
    except ValueError:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _accuracy(path: Path, status: dict[str, Any]) -> str:
    metrics = status.get("metrics") or {}
    if status.get("state") == "finished" and (found := _first(metrics)) is not None:
        return f"{found:.2f}"
    newest: dict[str, Any] = {}
    with suppress(InputError):
        for line in read_lines(path / "metrics.jsonl"):
            newest = line if line["event"] == "eval" else newest
    found = _first(newest)
    return "" if found is None else f"{found:.2f} {SHORT.get(newest.get('split', ''), '')}".strip()


def _first(metrics: dict[str, Any]) -> float | None:
    return next((metrics[key] for key in ACCURACIES if isinstance(metrics.get(key), float | int)), None)


def _teacher(section: Any) -> str:
    if isinstance(section, list):
        return " + ".join(map(_teacher, section))
    named = section or {}
    found = named.get("model") or named.get("recipe") or named.get("source")
    return str(found) if found else "none"


def runs_table(paths: Iterable[Path], folder: Path) -> Table:
    """A row a run, by its path below `folder`."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("state", "left"), ("age", "right"), ("epoch", "right"),
                          ("top-1 %", "right"), ("teacher", "left"), ("size", "right")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in map(listed, paths):
        name = str(row.path.relative_to(folder)) if row.path != folder else str(row.path)
        cells = [name, row.state, row.age, row.epoch, row.accuracy, row.teacher, row.parameters]
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def show_runs(folder: Path, *, watch: bool) -> None:
    """Print the runs under a folder; `watch`: again and again, until Ctrl-C.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder that holds the runs.")
    paths = list(runs_under(folder))
    if not paths:
        raise InputError(f"{folder}: no runs in it. `distill train RECIPE` begins one.")
    if not watch:
        console.print(runs_table(paths, folder))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(runs_table(runs_under(folder), folder), refresh=True)
            time.sleep(REFRESH)


def show_run(path: Path) -> None:
    """Print what one run has recorded: recipe, state, machine, accuracies, times, files, and how to go on.

    Raises:
        InputError: there is no run at `path`.
    """
    status, raw, environment = run.read_status(path), _recipe_of(path), run.read_environment(path)
    if not status or not raw:
        raise InputError(f"{path}: not a run directory. `distill runs` lists those under runs.")
    row = listed(path)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _facts(path, row, status, raw, environment):
        table.add_row(key, Text(visible(value)))
    console.print(table)


def _facts(
    path: Path, row: Listed, status: dict[str, Any], raw: dict[str, Any], environment: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    data, student = raw.get("data") or {}, raw.get("student") or {}
    yield "run", f"{path} ({raw.get('name', '')}, seed {raw.get('seed', 0)})"
    yield "state", f"{row.state}, {row.age} ago" + (f": {reason}" if (reason := status.get("reason")) else "")
    yield "data", f"{data.get('name')}, {data.get('resolution')} px"
    yield "teacher", row.teacher
    yield "student", f"{student.get('model')}, {row.parameters} parameters"
    yield "methods", ", ".join(str(method.get("method")) for method in raw.get("distill") or []) or "labels alone"
    yield "progress", f"epoch {row.epoch}, step {status.get('step', 0):,}"
    for key, value in sorted((status.get("metrics") or {}).items()):
        if key.endswith(("/top1", "/knn", "/linear")):
            yield key, f"{value:.2f} %"
    if (status.get("state") != "finished") and row.accuracy:
        yield "newest", f"{row.accuracy} %"
    for key, seconds in (status.get("seconds") or {}).items():
        yield f"{key} time", f"{seconds / 60:.1f} min"
    machine = [environment.get("device_name"), environment.get("precision"), f"{environment.get('threads')} threads"]
    yield "machine", ", ".join(str(part) for part in machine if part)
    for name in ("report.html", "export", "predictions.safetensors", "metrics.jsonl"):
        if (path / name).exists():
            yield name.partition(".")[0], str(path / name)
    if row.state in ("interrupted", "killed", "failed", "trained") and (command := environment.get("command")):
        yield "go on", recorded_command(command, resumed=path)
