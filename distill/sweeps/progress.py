"""What the run of a trial has recorded so far: its state, its validation figures and its training time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import run
from distill.errors import InputError
from distill.files.metrics import read_lines

SPLIT = "validation"
USUAL_METRIC = "student/top1"
PAUSED = ("resume", "start")
"""Lines before which a run did not train."""


@dataclass(frozen=True)
class Progress:
    """Of the run at `path`, which may not have begun; read from its files."""

    path: Path
    state: str | None
    status: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Progress:
        try:
            return cls(path, run.state_of(path), run.read_status(path), list(read_lines(path / "metrics.jsonl")))
        except InputError:  # damaged; the run itself says so when it is resumed
            return cls(path, None, {}, [])

    @property
    def trained(self) -> bool:
        """Whether the recipe has ended, but for the test."""
        return self.state in ("trained", "finished")

    @property
    def metric(self) -> str:
        """What the run selects its weights by."""
        return str(self.status.get("selected_by") or USUAL_METRIC)

    @property
    def samples(self) -> int | None:
        """Validation images; None: not known yet."""
        sizes = self.status.get("data_sizes")
        return None if sizes is None else int(sizes.get(SPLIT, 0))

    @property
    def value(self) -> float | None:
        """The best on validation so far."""
        return max((line[self.metric] for line in self._evaluations()), default=None)

    def rungs(self) -> Iterator[tuple[int, float]]:
        """The best after each epoch so far, once all weights of that epoch are evaluated."""
        best, last = float("-inf"), self.lines[-1]["event"] if self.lines else ""
        found: dict[int, float] = {}
        for line in self._evaluations():
            best = max(best, line[self.metric])
            found[max(1, int(line["epoch"]))] = best
        if last == "eval" and not self.trained and found:  # those of the averaged weights may follow
            found.popitem()
        yield from found.items()

    def training_minutes(self) -> float:
        """Since the student's first step, without interruptions; while the run goes on, until now."""
        total, before = 0.0, None
        for line in self.lines:
            if before is not None and line["event"] not in PAUSED:
                total += max(0.0, line["time"] - before)
            before = line["time"]
        if before is not None and self.state == "running" and self._begun() < before:
            total += max(0.0, time.time() - before)
        return total / 60

    def _begun(self) -> float:
        """When the newest process of the run took its lock; one that resumes has not trained before its first line."""
        try:
            return (self.path / ".lock").stat().st_mtime
        except OSError:
            return float("inf")

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def epoch(self) -> float:
        return max((line["epoch"] for line in self.lines), default=0.0)

    @property
    def teacher(self) -> float | None:
        """The teacher's own top-1 on validation, from the preflight."""
        found = (line.get("teacher/top1") for line in self.lines if line["event"] == "preflight")
        return (
            next(found, None)
            if any(line.get("split") == SPLIT for line in self.lines if line["event"] == "preflight")
            else None
        )

    @property
    def reason(self) -> str:
        """Why it ended, as it said; empty if it did not."""
        return str(self.status.get("reason") or "")

    def _evaluations(self) -> Iterator[dict[str, Any]]:
        for line in self.lines:
            if (
                line["event"] == "eval"
                and line.get("split") == SPLIT
                and isinstance(line.get(self.metric), float | int)
            ):
                yield line
