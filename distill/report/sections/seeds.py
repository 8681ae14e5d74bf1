"""Runs that differ in their seed only: mean, deviation, and paired tests over the seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from distill.report.comparison import Comparison
from distill.report.page import Cell, Section, Table, number
from distill.report.runs import Record, RunFiles
from distill.report.statistics import paired


@dataclass(frozen=True)
class Group:
    """The same recipe under several seeds."""

    name: str
    top1: Mapping[str, Mapping[int, float]]
    """Accuracies (percent) by model, by seed."""


def build(comparison: Comparison) -> Section | None:
    groups = [group for group in _groups(comparison) if len(group.top1["student"]) > 1]
    if not groups:
        return None
    rows, data = [], []
    for group in groups:
        for model, by_seed in group.top1.items():
            values = list(by_seed.values())
            mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
            rows.append(
                [
                    Cell(group.name),
                    Cell(model),
                    number(len(values), ",d"),
                    number(mean, ".2f"),
                    number(deviation, ".2f"),
                ]
            )
            figures = {"seeds": list(by_seed), "top1": values, "mean": mean, "deviation": deviation}
            data.append({"recipe": group.name, "model": model, **figures})
    verdicts = list(_verdicts(groups))
    lines = [
        [Cell(first), Cell(second), Cell(test.words, test.points), Cell(str(seeds), seeds)]
        for first, second, test, seeds in verdicts
    ]
    tested = [
        {"first": first, "second": second, "seeds": seeds, "points": test.points, "p": test.p, "words": test.words}
        for first, second, test, seeds in verdicts
    ]
    says = "Over the seeds: " + "; ".join(
        f"{first} against {second}: {test.words}" for first, second, test, _ in verdicts
    )
    if not verdicts:
        says = "Runs of the same recipe under several seeds, and how far they are spread"
    parts = [
        Table("seeds", "Mean and standard deviation of top-1.", ["recipe", "model", "seeds", "mean %", "sd"], rows, 2)
    ]
    if lines:
        header = ["first", "second", "first against second", "seeds"]
        parts.append(Table("seeds-tests", "Paired t-tests over the seeds that both have.", header, lines, 3))
    return Section("seeds", "Several seeds", f"{says}.", parts, {"groups": data, "tests": tested})


def _verdicts(groups: list[Group]) -> Any:
    """(first, second, test, seeds) of student and control within a group, and of the students of two groups."""
    for group in groups:
        if "control" in group.top1:
            yield from _tested(f"student of {group.name}", group.top1["student"], "its control", group.top1["control"])
    for a, b in combinations(groups, 2):
        yield from _tested(f"student of {a.name}", a.top1["student"], f"student of {b.name}", b.top1["student"])


def _tested(first: str, a: Mapping[int, float], second: str, b: Mapping[int, float]) -> Any:
    common = sorted(set(a) & set(b))
    if len(common) > 1:
        yield first, second, paired([a[seed] for seed in common], [b[seed] for seed in common]), len(common)


def _groups(comparison: Comparison) -> list[Group]:
    """Runs whose recipes are the same but for name and seed, each seed once, in the order of the runs."""
    found: dict[str, dict[int, str]] = {}
    for name, run in comparison.runs.items():
        if run.recipe:
            found.setdefault(_recipe_but_for_seed(run.recipe), {}).setdefault(_seed(run), name)
    groups = []
    for names in found.values():
        top1: dict[str, dict[int, float]] = {"student": {}}
        for seed, name in names.items():
            for model in ("student", "control"):
                if (row := comparison.row(name, model)) is not None:
                    top1.setdefault(model, {})[seed] = row.metrics.top1
        if len(top1.get("control", {})) < 2:
            top1.pop("control", None)
        groups.append(Group(next(iter(names.values())), top1))
    return groups


def _seed(run: RunFiles) -> int:
    return int(run.recipe.get("seed", 0))


def _recipe_but_for_seed(recipe: Record) -> str:
    return json.dumps({key: value for key, value in recipe.items() if key not in ("seed", "name")}, sort_keys=True)
