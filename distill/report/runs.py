"""A run directory, read: the files that a report is made of, and nothing that needs a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.recipe import read_yaml
from distill.report.metrics import Predictions, read_predictions

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What one finished run left behind; `control` is the run under `control/`, if there is one."""

    path: Path
    predictions: Predictions
    status: Record
    recipe: Record
    environment: Record
    events: tuple[Record, ...]
    """The lines of metrics.jsonl in their order."""
    control: RunFiles | None

    @property
    def data_digest(self) -> str | None:
        """Identifies the data; None where the run did not record it."""
        return self.status.get("data_digest")

    @property
    def selected_on_test(self) -> bool:
        return (self.recipe.get("data") or {}).get("select_on") == "test"

    def parameters(self, model: str) -> int | None:
        """Of 'student' or 'teacher'; None where the run did not record it."""
        return (self.status.get("parameters") or {}).get(model)


def read_run(path: Path) -> RunFiles:
    """Read a finished run.

    Raises:
        InputError: the directory is missing, no run or not finished, or a file in it is damaged; so for its control.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run directory.")
    status = _read_json(path / "status.json")
    if status is None:
        raise InputError(f"{path}: not a run directory: it has no status.json.")
    state = status.get("state")
    if state != "finished":
        raise InputError(f"{path}: the run is not finished (its state is '{state}'). Resume it, then compare.")
    return RunFiles(
        path=path,
        predictions=read_predictions(path / "predictions.safetensors"),
        status=status,
        recipe=_read_recipe(path / "resolved.yaml"),
        environment=_read_json(path / "environment.json") or {},
        events=tuple(_read_lines(path / "metrics.jsonl")),
        control=read_run(path / "control") if (path / "control").is_dir() else None,
    )


def _read_text(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    return None if text is None else _parse_json(text, str(path))


def _read_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate((_read_text(path) or "").splitlines(), start=1):
        yield _parse_json(line, f"{path}, line {number}")


def _parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: a JSON object is expected, not a {type(value).__name__}.")
    return value


def _read_recipe(path: Path) -> dict[str, Any]:
    """As plain data, unvalidated: a report on a run of an earlier version is still a report."""
    text = _read_text(path)
    value = {} if text is None else read_yaml(text, source=str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: a resolved recipe is a mapping of keys to values.")
    return value
