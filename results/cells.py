"""The collected runs as cells, and what they say: means, deviations and paired tests, all by the report's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.report.comparison import Comparison, Row, compare
from distill.report.metrics import measure, read_predictions
from distill.report.runs import Record, RunFiles
from distill.report.sections import seeds
from distill.report.statistics import in_words, mcnemar
from distill.run import read_recipe
from results.arms import ARMS, identity, seeds_of
from results.collect import TEACHERS, is_chosen, teacher_of


@dataclass(frozen=True)
class Difference:
    """Of two arms, or of an arm and its teacher, over the seeds that both have."""

    points: float
    p: float
    """Of McNemar's exact test of all answers together."""
    seeds: int
    p_over_seeds: float | None = None
    """Of the paired t-test of the accuracies; None over one seed."""

    @property
    def words(self) -> str:
        return in_words(self.points, self.p)


@dataclass(frozen=True)
class Cells:
    """All collected runs."""

    folder: Path
    comparison: Comparison | None
    """None where nothing is collected."""
    runs: Mapping[str, Mapping[int, RunFiles]]
    """By arm, by seed."""

    def top1(self, arm: str) -> list[float]:
        """On the test set, in percent, by seed."""
        return [self._row(arm, seed).metrics.top1 for seed in self.runs.get(arm, {})]

    def validation(self, arm: str) -> float | None:
        """Mean accuracy of what was exported on the split that it was chosen on."""
        found = [
            event["student/top1"]
            for run in self.runs.get(arm, {}).values()
            for event in run.events
            if is_chosen(event, run.status.get("exported"))
        ]
        return float(np.mean(found)) if found else None

    def minutes(self, arm: str) -> float | None:
        """Mean time of training."""
        found = [seconds for run in self.runs.get(arm, {}).values() if (seconds := run.status.get("training_seconds"))]
        return float(np.mean(found)) / 60 if found else None

    def teacher(self, run: RunFiles) -> tuple[str, float] | None:
        """What a run's teacher is, and its accuracy on the test set."""
        file = self.folder / TEACHERS / f"{teacher_of(run)}.safetensors"
        if not file.exists():
            return None
        event = next(event for event in run.events if event.get("event") == "preflight")
        predictions = read_predictions(file)
        top1 = measure(predictions.logits["student.fused"], predictions.labels).top1
        return str(event["teacher"]).partition(": ")[0], top1

    def difference(self, arm: str, other: str) -> Difference | None:
        """None where no seed has both; over one seed McNemar's test of its images, over several of all their answers
        together.
        """
        common = sorted(set(self.runs.get(arm, {})) & set(self.runs.get(other, {})))
        if len(common) > 1:
            first, second = (f"student of {name}-{min(self.runs[name])}" for name in (arm, other))
            for pair, sign in (((first, second), 1), ((second, first), -1)):
                if (test := self._tests.get(pair)) is not None:
                    return Difference(sign * test["points"], test["p_pooled"], test["seeds"], test["p_over_seeds"])
            raise InputError(f"{self.folder}: the runs of {arm} or of {other} differ in more than their seed.")
        if not common:
            return None
        assert self.comparison is not None
        verdict = self.comparison.verdict(self._row(arm, common[0]), self._row(other, common[0]))
        return Difference(verdict.points, verdict.p, 1)

    def matched(self, arm: str, other: str) -> str:
        """What two arms have in common under each seed: the weights that they began from, and the batches they saw."""
        common = sorted(set(self.runs.get(arm, {})) & set(self.runs.get(other, {})))
        pairs = [(self.runs[arm][seed].events, self.runs[other][seed].events) for seed in common]
        weights = all(_began_with(one) == _began_with(two) for one, two in pairs)
        batches = all(_saw(one) == _saw(two) for one, two in pairs)
        return " and ".join(name for name, same in (("weights", weights), ("batches", batches)) if same)

    def against_teacher(self, arm: str) -> Difference | None:
        """The arm minus its teacher, over all its seeds."""
        answers = []
        for seed, run in self.runs.get(arm, {}).items():
            file = self.folder / TEACHERS / f"{teacher_of(run)}.safetensors"
            if not file.exists():
                return None
            predictions = read_predictions(file)
            logits = self._row(arm, seed).logits, predictions.logits["student.fused"]
            answers.append([values.argmax(1) == predictions.labels for values in logits])
        if not answers:
            return None
        verdict = mcnemar(arm, "its teacher", *(np.concatenate(rights) for rights in zip(*answers, strict=True)))
        return Difference(verdict.points, verdict.p, len(answers))

    def _row(self, arm: str, seed: int) -> Row:
        assert self.comparison is not None
        row = self.comparison.row(f"{arm}-{seed}", "student")
        assert row is not None, "read_run asks for the student's logits"
        return row

    @cached_property
    def _tests(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Of all pairs of arms with two seeds in common, as the report on all runs has them."""
        assert self.comparison is not None
        section = seeds.build(self.comparison)
        return {} if section is None else {(test["first"], test["second"]): test for test in section.data["tests"]}


def _began_with(events: Sequence[Record]) -> list[str]:
    return [event["initial_weights"] for event in events if event.get("event") == "start"]


def _saw(events: Sequence[Record]) -> dict[int, str]:
    """The digest of an epoch's first batch, by step."""
    return {event["step"]: event["batch"] for event in events if event.get("event") == "epoch"}


def read_cells(folder: Path) -> Cells:
    """All collected runs under `folder`.

    Raises:
        InputError: one is damaged, or is not what results/arms.py says of its name.
    """
    found: dict[str, dict[int, Path]] = {}
    for name, arm in ARMS.items():
        for seed in seeds_of(name):
            path = folder / f"{name}-{seed}"
            if path.exists():
                if identity(read_recipe(path)) != identity(arm.load(seed)):
                    raise InputError(
                        f"{path}: its recipe is not what results/arms.py says of {name}. Remove or rerun it."
                    )
                found.setdefault(name, {})[seed] = path
    known = {path.name for paths in found.values() for path in paths.values()} | {TEACHERS}
    if strange := sorted(path.name for path in folder.glob("[!.]*") if path.name not in known):
        raise InputError(f"{folder}: no cells of results/arms.py: {', '.join(strange)}.")
    if not found:
        return Cells(folder, None, {})
    comparison = compare([path for paths in found.values() for path in paths.values()])
    runs = {name: {seed: comparison.runs[path.name] for seed, path in paths.items()} for name, paths in found.items()}
    return Cells(folder, comparison, runs)
