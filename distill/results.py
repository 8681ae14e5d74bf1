"""What the Python API returns: runs, sweeps, evaluations and reports. Files are read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.errors import InputError
from distill.files.regular import reachable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from distill.exports.prediction import LoadedStudent
    from distill.report.comparison import Comparison
    from distill.report.metrics import Metrics


class Report(NamedTuple):
    """A comparison, and the files that show it: HTML, Markdown, JSON and the curves as SVG."""

    comparison: Comparison
    files: list[Path]


class Run:
    """A run directory, read again at each call, also during the run. Accepted wherever a path is."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """
        Raises:
            InputError: no run has begun there.
        """
        self.path = Path(path)
        with reachable():
            begun = (self.path / "status.json").is_file()
        if not begun:
            raise InputError(f"{self.path}: not a run directory (it has no status.json).")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.status.get('state')}"

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`: `state` ('running', 'finished', 'trained' by a recipe without `train.test`, 'interrupted',
        'failed', or 'killed' if no process was left to write it), `reason`, `step`, `epoch`, the last `metrics`, and
        so on.
        """
        from distill import run

        return run.read_status(self.path) | {"state": run.state_of(self.path)}

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, optionally of one `event` ('train', 'eval', 'preflight', ...)."""
        from distill.files.metrics import read_lines

        return [line for line in read_lines(self.path / "metrics.jsonl") if event in (None, line["event"])]

    def predictions(self) -> dict[str, Tensor]:
        """Test set outputs of a finished run: `labels` int64 [N], and logits float32 [N, classes] of `student.fused`,
        `student.cls`, and, if present, `student.dist` and `teacher`.

        Raises:
            InputError: they are missing or damaged.
        """
        import torch

        from distill.report.metrics import read_predictions

        found = read_predictions(self.path / "predictions.safetensors")
        arrays = {"labels": found.labels, **found.logits}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def student(self) -> LoadedStudent:
        """The exported student, as returned by `load_student`.

        Raises:
            InputError: there is none, or it is damaged.
        """
        from distill.exports.prediction import load_student

        with reachable():
            return load_student(self.path / "export")

    def report(self) -> Report:
        """Teacher, student and control of this finished run side by side, written to `report.html` in its directory."""
        with reachable():
            return written([self.path], self.path / "report.html")


def written(runs: Sequence[Path], html: Path) -> Report:
    """The comparison of finished runs, written as a report."""
    from distill.report.comparison import compare
    from distill.report.document import write_report

    comparison = compare(runs)
    return Report(comparison, write_report(comparison, html))


class SweepTrial(NamedTuple):
    """One run of a sweep."""

    run: Path
    """Its run directory, for `distill.Run`; not there yet if the state is 'waiting'."""
    values: dict[str, Any]
    """By dotted key of the recipe, without the seed."""
    seed: int
    state: str
    """'waiting', 'running', 'complete', 'pruned' or 'fail'."""
    validation: float | None
    """The best accuracy on validation, in percent; None: it has none."""
    note: str
    """Why it failed or was stopped."""


class Winner(NamedTuple):
    """The configuration that a sweep has chosen."""

    values: dict[str, Any]
    """By dotted key of the recipe, without the seed; empty for a sweep of seeds alone."""
    validation: float
    """Mean over its seeds of the best accuracy on validation, in percent; optimistic, being the largest of several."""
    interval: tuple[float, float] | None
    """95 % of the same."""
    runs: list[Run]
    """One for each seed; finished with a test, except in a sweep whose trials are cut short by `minutes`."""


class Sweep:
    """A sweep's directory, read again at each call."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """
        Raises:
            InputError: no sweep there has come to a ranking.
        """
        self.path = Path(path)
        self.record  # noqa: B018 (may raise)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r}): {len(self.record['trials'])} trials"

    @property
    def record(self) -> dict[str, Any]:
        """`sweep.json`: trials, ranking with intervals, what was chosen, importance of the keys."""
        from distill.files.plain_data import read_json

        with reachable():
            found = read_json(self.path / "sweep.json")
        if found is None:
            raise InputError(f"{self.path}: no sweep has come to its ranking there (it has no sweep.json).")
        return found

    @property
    def trials(self) -> list[SweepTrial]:
        return [
            SweepTrial(
                self.path / trial["path"],
                *(trial[name] for name in ("values", "seed", "state", "validation", "note")),
            )
            for trial in self.record["trials"]
        ]

    @property
    def winner(self) -> Winner | None:
        """None where no trial is complete."""
        record = self.record
        if (chosen := record["chosen"]) is None:
            return None
        best = record["ranking"][0]
        interval = None if best["interval"] is None else (best["interval"][0], best["interval"][1])
        return Winner(chosen["values"], best["mean"], interval, [Run(self.path / path) for path in chosen["paths"]])

    @property
    def report(self) -> Path | None:
        """`report.html`: the sweep, and the winner beside its teacher and control; None for pilots of `minutes`."""
        path = self.path / "report.html"
        return path if path.is_file() else None


class Evaluation(dict[str, "Metrics"]):
    """Metrics by output: `student.fused`, `student.cls`, `student.dist`, `teacher`; and what they are of."""

    def __init__(
        self,
        logits: Mapping[str, NDArray[np.floating]],
        labels: NDArray[np.int64],
        class_names: Sequence[str],
        report: Path | None,
    ) -> None:
        from distill.report.metrics import measure

        super().__init__({name: measure(values, labels) for name, values in logits.items()})
        self.logits = dict(logits)
        """[N, classes] by output."""
        self.labels = labels
        """int64 [N]"""
        self.class_names = list(class_names)
        self.report = report
        """`report.html` beside the predictions; None for a teacher."""

    @property
    def images(self) -> dict[str, int]:
        """Test images by class; 0 for a class that the data do not have."""
        return {name: int((self.labels == index).sum()) for index, name in enumerate(self.class_names)}

    def by_class(self, output: str) -> dict[str, float | None]:
        """Accuracy in percent by class; None for a class without images."""
        from distill.report.sections.classes import accuracy_by_class, confusion

        found = accuracy_by_class(confusion(self.logits[output], self.labels), self.labels)
        return dict(zip(self.class_names, found, strict=True))
