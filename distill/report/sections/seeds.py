"""Runs that differ in their seed only: mean, deviation, and paired tests over the seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from distill.recipe import OPERATIONAL_KEYS
from distill.report.comparison import Comparison, Row
from distill.report.metrics import Ints
from distill.report.page import Cell, Section, Table, number
from distill.report.statistics import Paired, Verdict, mcnemar, p_text, paired


@dataclass(frozen=True)
class Group:
    """The same recipe under several seeds."""

    name: str
    answers: Mapping[str, Mapping[int, Row]]
    """By model, by seed."""


def build(comparison: Comparison) -> Section | None:
    groups = [group for group in _groups(comparison) if len(group.answers["student"]) > 1]
    if not groups:
        return None
    rows, data = [], []
    for group in groups:
        for model, by_seed in group.answers.items():
            values = [row.metrics.top1 for row in by_seed.values()]
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
    tests = list(_tests(groups, comparison.labels))
    lines = [
        [
            Cell(test.first),
            Cell(test.second),
            Cell(test.pooled.words, test.pooled.points),
            Cell("" if test.paired.p is None else p_text(test.paired.p), test.paired.p),
            Cell(str(test.seeds), test.seeds),
        ]
        for test in tests
    ]
    tested = [
        {
            "first": test.first,
            "second": test.second,
            "seeds": test.seeds,
            "points": test.paired.points,
            "p_over_seeds": test.paired.p,
            "p_pooled": test.pooled.p,
            "words": test.pooled.words,
        }
        for test in tests
    ]
    says = "Over the seeds: " + "; ".join(f"{test.first} against {test.second}: {test.pooled.words}" for test in tests)
    if not tests:
        says = "Runs of the same recipe under several seeds, and how far they are spread"
    parts = [
        Table("seeds", "Mean and standard deviation of top-1.", ["recipe", "model", "seeds", "mean %", "sd"], rows, 2)
    ]
    if lines:
        header = ["first", "second", "first against second", "t-test", "seeds"]
        caption = (
            "Over the seeds that both have: McNemar's exact test of all their answers together (an image counts once a "
            "seed), and a paired t-test of their accuracies."
        )
        parts.append(Table("seeds-tests", caption, header, lines, 3))
    return Section("seeds", "Several seeds", f"{says}.", parts, {"groups": data, "tests": tested})


@dataclass(frozen=True)
class SeedsTest:
    """Two models over the seeds that both have."""

    first: str
    second: str
    seeds: int
    pooled: Verdict
    paired: Paired


def _tests(groups: list[Group], labels: Ints) -> Iterator[SeedsTest]:
    """Of student and control within a group, and of the students of two groups."""
    for group in groups:
        if "control" in group.answers:
            yield from _test(
                f"student of {group.name}", group.answers["student"], "its control", group.answers["control"], labels
            )
    for a, b in combinations(groups, 2):
        yield from _test(
            f"student of {a.name}", a.answers["student"], f"student of {b.name}", b.answers["student"], labels
        )


def _test(first: str, a: Mapping[int, Row], second: str, b: Mapping[int, Row], labels: Ints) -> Iterator[SeedsTest]:
    common = sorted(set(a) & set(b))
    if len(common) > 1:
        rights = [np.concatenate([rows[seed].logits.argmax(1) == labels for seed in common]) for rows in (a, b)]
        accuracies = [[rows[seed].metrics.top1 for seed in common] for rows in (a, b)]
        yield SeedsTest(first, second, len(common), mcnemar(first, second, *rights), paired(*accuracies))


def _groups(comparison: Comparison) -> list[Group]:
    """Runs whose recipes are the same but for what only names or runs them, by seed, in the order of the runs."""
    found: dict[str, dict[int, str]] = {}
    for name, run in comparison.runs.items():
        if (recipe := run.known_recipe) is not None:
            found.setdefault(recipe.digest(OPERATIONAL_KEYS | {"seed", "control"}), {}).setdefault(recipe.seed, name)
    groups = []
    for names in found.values():
        students = {seed: row for seed, name in names.items() if (row := comparison.row(name, "student"))}
        controls = {seed: row for seed, name in names.items() if (row := comparison.control_of(name))}
        answers = {"student": students} | ({"control": controls} if len(controls) > 1 else {})
        groups.append(Group(next(iter(names.values())), answers))
    return groups
