"""Runs that differ in their seed only: mean, deviation, and paired tests over the seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from distill.report.comparison import Comparison, Row
from distill.report.groups import groups_of
from distill.report.metrics import Ints, decisions
from distill.report.page import Section, Table
from distill.report.statistics import over_seeds, p_value, paired

BySeed = Mapping[int, Row]
Groups = Mapping[str, Mapping[str, BySeed]]
"""By the name of a recipe, by model: its answers under several seeds."""


def build(comparison: Comparison) -> Section | None:
    groups = {name: models for name, models in _groups(comparison) if len(models["student"]) > 1}
    if not groups:
        return None
    spreads = [
        {"recipe": name, "model": next(iter(by_seed.values())).role, "seeds": list(by_seed), **_spread(by_seed)}
        for name, models in groups.items()
        for model, by_seed in models.items()
    ]
    tests = list(_tests(groups, comparison.labels))
    said = [f"{test['first']} against {test['second']}: {test['words']}" for test in tests]
    says = f"Over the seeds: {'; '.join(said)}" if said else "Runs of the same recipe under several seeds"
    spread = Table.of(
        "seeds",
        "Mean and standard deviation of top-1.",
        spreads,
        [
            ("recipe", "recipe", ""),
            ("model", "model", ""),
            ("seeds", "seeds", lambda seeds: str(len(seeds))),
            ("mean %", "mean", ".2f"),
            ("sd", "deviation", ".2f"),
        ],
    )
    tested = Table.of(
        "seeds-tests",
        "Over the seeds that both have: the interval of a bootstrap over seeds and images, p of a sign-flip test over "
        "the images, and of a paired t-test of the accuracies over the seeds.",
        tests,
        [
            ("first", "first", ""),
            ("second", "second", ""),
            ("first against second", "words", ""),
            ("95 % interval", "interval", "{0[0]:+.2f} to {0[1]:+.2f}".format),
            ("p, images", "p_over_images", p_value),
            ("p, seeds", "p_over_seeds", p_value),
            ("seeds", "seeds", "d"),
        ],
    )
    parts = [spread, tested] if tests else [spread]
    return Section("seeds", "Several seeds", f"{says}.", parts, {"groups": spreads, "tests": tests})


def _spread(by_seed: BySeed) -> dict[str, Any]:
    top1 = [row.metrics.top1 for row in by_seed.values()]
    return {"top1": top1, "mean": float(np.mean(top1)), "deviation": float(np.std(top1, ddof=1))}


def _tests(groups: Groups, labels: Ints) -> Iterator[dict[str, Any]]:
    """Of student and control within a group, and of the students of two groups."""
    called = {name: f"{next(iter(models['student'].values())).role} of {name}" for name, models in groups.items()}
    for name, models in groups.items():
        if "control" in models:
            yield from _test(called[name], models["student"], "its control", models["control"], labels)
    for (a, one), (b, other) in combinations(groups.items(), 2):
        if one.get("control") == other["student"] or other.get("control") == one["student"]:
            continue  # runs that are the controls of others: tested with their students
        yield from _test(called[a], one["student"], called[b], other["student"], labels)


def _test(first: str, a: BySeed, second: str, b: BySeed, labels: Ints) -> Iterator[dict[str, Any]]:
    """Of two models over the seeds that both have."""
    common = sorted(set(a) & set(b))
    if len(common) > 1:
        rights = [[decisions(rows[seed].logits) == labels for seed in common] for rows in (a, b)]
        accuracies = [[rows[seed].metrics.top1 for seed in common] for rows in (a, b)]
        test = over_seeds(list(zip(*rights, strict=True)))
        yield {
            "first": first,
            "second": second,
            "seeds": len(common),
            "points": test.points,
            "interval": [test.low, test.high],
            "p_over_seeds": paired(*accuracies),
            "p_over_images": test.p,
            "words": test.words,
        }


def _groups(comparison: Comparison) -> Iterator[tuple[str, dict[str, BySeed]]]:
    """By the name of each group of runs: its students and, under several seeds, controls."""
    for group in groups_of(comparison):
        models: dict[str, BySeed] = {"student": group.students(comparison)}
        if len(controls := group.controls(comparison)) > 1:
            models["control"] = controls
        yield group.name, models
