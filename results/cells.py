"""The collected runs as cells, and what they say: accuracies, times and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.errors import InputError
from distill.report.metrics import Metrics, Predictions, decisions, measure, read_predictions
from distill.report.runs import Record, RunFiles, read_run
from distill.report.statistics import Right, mcnemar, over_seeds, paired
from distill.run import read_recipe
from results.arms import ARMS, identity, load_arm, seeds_of
from results.collect import PIXELS, TEACHERS, is_chosen, teacher_of

Rights = Mapping[int, Right]
"""By seed, bool [images]: which test images are answered rightly."""


@dataclass(frozen=True)
class Difference:
    """Of two arms, or of an arm and its teacher, over the seeds that both have."""

    points: float
    p: float
    """Of the sign-flip test over the images, which for one seed is McNemar's exact test."""
    seeds: int
    interval: tuple[float, float]
    """95 % interval of `points`: a bootstrap over seeds and images, over one seed of its images."""
    words: str
    p_over_seeds: float | None = None
    """Of the paired t-test of the accuracies; None over one seed."""


@dataclass(frozen=True)
class Cells:
    """All collected runs."""

    folder: Path
    runs: Mapping[str, Mapping[int, RunFiles]]
    """By arm, by seed."""

    def of(self, arm: str) -> list[RunFiles]:
        return list(self.runs.get(arm, {}).values())

    def rights(self, arm: str) -> Rights:
        return {seed: _right(run.predictions) for seed, run in self.runs.get(arm, {}).items()}

    def rights_of_teacher(self, arm: str) -> Rights:
        """Of the teacher of each of an arm's runs, where its answers were collected."""
        found = {seed: self._teacher(run) for seed, run in self.runs.get(arm, {}).items()}
        return {seed: _right(predictions) for seed, predictions in found.items() if predictions is not None}

    def top1(self, arm: str) -> list[float]:
        """On the test set, in percent, by seed."""
        return list(map(_percent, self.rights(arm).values()))

    def metrics(self, arm: str) -> list[Metrics]:
        """On the test set, by seed."""
        found = (run.predictions for run in self.of(arm))
        return [measure(predictions.logits["student.fused"], predictions.labels) for predictions in found]

    def tested(self, arm: str, name: str) -> list[float]:
        """A value of the runs' test, such as 'student/knn', by seed."""
        metrics = [run.status.get("metrics") or {} for run in self.of(arm)]
        return [values[name] for values in metrics if name in values]

    def pixels(self, arms: Sequence[str]) -> tuple[int, int] | None:
        """Of k-NN on raw pixels, test images and right answers: those of the first run that measured it, since they
        depend on the data only.
        """
        images, correct = ([value for arm in arms for value in self.tested(arm, f"pixels/{key}")] for key in PIXELS)
        return (int(images[0]), int(correct[0])) if images else None

    def validation(self, arm: str) -> float | None:
        """Mean accuracy of what was exported on the split that it was chosen on."""
        found = [
            event["student/top1" if "student/top1" in event else "student/knn"]
            for run in self.of(arm)
            for event in run.events
            if is_chosen(event, run.status.get("exported"))
        ]
        return float(np.mean(found)) if found else None

    def minutes(self, arm: str) -> float | None:
        """Mean time of training; of older runs with their evaluations."""
        found = [seconds for run in self.of(arm) if (seconds := run.status.get("training_seconds"))]
        return float(np.mean(found)) / 60 if found else None

    def agreement(self, arm: str) -> float | None:
        """Percentage of test images that student and teacher decide alike, the mean over the seeds."""
        pairs = [(run.predictions, self._teacher(run)) for run in self.of(arm)]
        shares = [
            _percent(decisions(ours.logits["student.fused"]) == decisions(theirs.logits["student.fused"]))
            for ours, theirs in pairs
            if theirs is not None
        ]
        return float(np.mean(shares)) if shares else None

    def teacher(self, run: RunFiles) -> tuple[str, float] | None:
        """What a run's teacher is, and its accuracy on the test set."""
        if (predictions := self._teacher(run)) is None:
            return None
        event = next(event for event in run.events if event.get("event") == "preflight")
        return str(event["teacher"]).partition(": ")[0], _percent(_right(predictions))

    def _teacher(self, run: RunFiles) -> Predictions | None:
        file = self.folder / TEACHERS / f"{teacher_of(run)}.safetensors"
        return read_predictions(file) if file.exists() else None

    def matched(self, arm: str, other: str) -> str:
        """What two arms have in common under each seed: the weights that they began from, and the batches they saw."""
        common = sorted(set(self.runs.get(arm, {})) & set(self.runs.get(other, {})))
        pairs = [(self.runs[arm][seed].events, self.runs[other][seed].events) for seed in common]
        weights = all(_began_with(one) == _began_with(two) for one, two in pairs)
        batches = all(_saw(one) == _saw(two) for one, two in pairs)
        return " and ".join(name for name, same in (("weights", weights), ("batches", batches)) if same)


def difference(ours: Rights, theirs: Rights) -> Difference | None:
    """None where no seed has both."""
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    pairs = [(ours[seed], theirs[seed]) for seed in common]
    if len(pairs) == 1:
        alone = mcnemar("", "", *pairs[0])
        return Difference(alone.points, alone.p, 1, (alone.low, alone.high), alone.words)
    found = over_seeds(pairs)
    p_over_seeds = paired(*(list(map(_percent, rights)) for rights in zip(*pairs, strict=True)))
    return Difference(found.points, found.p, len(pairs), (found.low, found.high), found.words, p_over_seeds)


def _right(predictions: Predictions) -> Right:
    return decisions(predictions.logits["student.fused"]) == predictions.labels


def _percent(right: Right) -> float:
    return 100.0 * float(right.mean())


def _began_with(events: Sequence[Record]) -> list[str]:
    return [event["initial_weights"] for event in events if event.get("event") == "start"]


def _saw(events: Sequence[Record]) -> dict[int, str]:
    """The digest of an epoch's first batch, by step."""
    return {event["step"]: event["batch"] for event in events if event.get("event") == "epoch"}


def read_cells(folder: Path) -> Cells:
    """All collected runs under `folder`.

    Raises:
        InputError: one is damaged, is not what its name says, or was measured on another test set.
    """
    found: dict[str, dict[int, RunFiles]] = {}
    for arm in ARMS:
        for seed in seeds_of(arm):
            path = folder / f"{arm}-{seed}"
            if path.exists():
                if identity(read_recipe(path)) != identity(load_arm(arm, seed)):
                    raise InputError(f"{path}: its recipe is not that of {ARMS[arm].name}. Remove or rerun it.")
                found.setdefault(arm, {})[seed] = read_run(path)
    runs = [run for by_seed in found.values() for run in by_seed.values()]
    known = {run.path.name for run in runs} | {TEACHERS}
    if strange := sorted(path.name for path in folder.glob("[!.]*") if path.name not in known):
        raise InputError(f"{folder}: no cells of plan.yaml: {', '.join(strange)}.")
    first: dict[str, RunFiles] = {}
    for run in runs:
        other = first.setdefault(run.recipe["data"]["name"], run)
        if not np.array_equal(run.predictions.labels, other.predictions.labels):
            raise InputError(f"{run.path}: measured on another test set than {other.path}. Remove or rerun it.")
    return Cells(folder, found)
