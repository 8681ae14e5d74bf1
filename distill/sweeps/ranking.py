"""Ranks configurations on validation, with intervals, and puts all that a sweep found into one record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from distill import run
from distill.report.statistics import paired, wilson
from distill.sweeps import axes
from distill.sweeps.progress import USUAL_METRIC, Progress
from distill.sweeps.schema import Sweep
from distill.sweeps.study import Study, Trial

TESTED = ("student/top1", "student/knn")
CONFIDENCE = 0.95


def ranked(trials: Iterable[Trial]) -> list[list[Trial]]:
    """The complete trials of each configuration, the best mean first; those that lack a seed come after the others."""
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        if trial.state == "complete":
            groups.setdefault(trial.configuration, []).append(trial)
    return sorted(groups.values(), key=lambda group: (-len(group), -_mean(group), group[0].number))


def _mean(group: Sequence[Trial]) -> float:
    return float(np.mean(_values(group)))


def _values(group: Sequence[Trial]) -> list[float]:
    return [trial.value for trial in group if trial.value is not None]


def interval(values: Sequence[float], samples: int | None) -> tuple[float, float] | None:
    """95 % of an accuracy in percent: Wilson's of one run over its images, Student's t of the mean over several seeds;
    None where the number of images is not known.
    """
    if len(values) > 1:
        half = float(stats.t.isf((1 - CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
        return float(np.mean(values)) - half, float(np.mean(values)) + half
    return wilson(round(values[0] * samples / 100), samples) if samples else None


def record(sweep: Sweep, study: Study, folder: Path) -> dict[str, Any]:
    """The content of `sweep.json`: what was tried, the ranking, and what was chosen; accuracies in percent."""
    trials = study.trials()
    paths = {trial.number: folder / "trials" / trial.name for trial in trials}
    progress = {trial.number: Progress.of(paths[trial.number]) for trial in trials if trial.state != "waiting"}
    groups = ranked(trials)
    begun = [found for found in progress.values() if found.samples is not None]
    # Wilson's interval is of counts, which the mean over classes is not.
    samples = begun[0].samples if begun and begun[0].metric != "student/macro" else None
    best = {trial.seed: trial.value for trial in groups[0]} if groups else {}
    tested = [trial for trial in groups[0] if run.is_finished(paths[trial.number])] if groups and sweep.tested else []
    return {
        "name": folder.name,
        "base": sweep.resolved.name,
        "search": sweep.options.search,
        "keys": [one.key for one in sweep.axes],
        "seeds": list(sweep.seeds),
        "metric": begun[0].metric if begun else USUAL_METRIC,
        "validation_images": samples,
        "trials": [_trial(sweep, trial, progress.get(trial.number), paths[trial.number], folder) for trial in trials],
        "ranking": [_rank(sweep, place, group, best, samples) for place, group in enumerate(groups, start=1)],
        "chosen": _chosen(groups[0], tested, paths, folder) if groups else None,
        "importance": study.importance(),
        "told": [],
    }


def _trial(sweep: Sweep, trial: Trial, progress: Progress | None, path: Path, folder: Path) -> dict[str, Any]:
    return {
        "number": trial.number,
        "name": trial.name,
        "path": str(path.relative_to(folder)),
        "values": trial.values,
        "labels": axes.labels(trial.values, sweep.axes),
        "seed": trial.seed,
        "configuration": trial.configuration,
        "state": trial.state,
        "validation": trial.value,
        "epoch": None if progress is None else progress.epoch,
        "minutes": None if progress is None else round(progress.training_minutes(), 2),
        "teacher": None if progress is None else progress.teacher,
        "failures": trial.failures,
        "note": trial.note,
    }


def _rank(
    sweep: Sweep, place: int, group: Sequence[Trial], best: dict[int, float | None], samples: int | None
) -> dict[str, Any]:
    values = _values(group)
    common = [
        (value, trial.value)
        for trial in group
        if (value := best.get(trial.seed)) is not None and trial.value is not None
    ]
    return {
        "rank": place,
        "configuration": group[0].configuration,
        "values": group[0].values,
        "labels": axes.labels(group[0].values, sweep.axes),
        "seeds": [trial.seed for trial in group],
        "trials": [trial.number for trial in group],
        "validation": values,
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "interval": interval(values, samples),
        "p_against_best": paired(*zip(*common, strict=True)) if place > 1 and len(common) > 1 else None,
    }


def _chosen(group: Sequence[Trial], tested: Sequence[Trial], paths: dict[int, Path], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "configuration": group[0].configuration,
        "values": group[0].values,
        "trials": [trial.number for trial in group],
        "paths": [str(paths[trial.number].relative_to(folder)) for trial in group],
    }
    for name, part in (("test", ""), ("test_of_controls", "control")):
        values = [_tested(paths[trial.number] / part) for trial in tested]
        known = [value for value in values if value is not None]
        if known:
            found[name] = {
                "values": known,
                "mean": float(np.mean(known)),
                "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
            }
    return found


def _tested(path: Path) -> float | None:
    """The test accuracy of a finished run in percent."""
    lines = run.read_metrics(path, "eval") if path.is_dir() else iter(())
    for line in (line for line in lines if line.get("split") == "test"):
        return next((float(line[key]) for key in TESTED if key in line), None)
    return None
