"""Where each student stands: accuracy, difference from its teacher and its control, and costs beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from distill.report.comparison import UNITS, Comparison, Row
from distill.report.groups import Group, groups_of
from distill.report.metrics import Ints, decisions
from distill.report.roles import STUDENT
from distill.report.statistics import EQUAL, SIGNIFICANT, bootstrap_over_seeds, mcnemar, p_text

Shown = Literal["better", "worse", "equal", "open"]
BySeed = Mapping[int, Row]


class Difference(NamedTuple):
    """Of a student's accuracy from another model's, in points."""

    points: float
    low: float
    """95 % interval, of a bootstrap over images, and over seeds where there are several."""
    high: float
    p: float | None
    """Of McNemar's test; None over several seeds."""
    shown: Shown
    """'equal': within `EQUAL` points. Of one pair by McNemar's test and TOST, of several by the interval."""
    other: float
    """The other model's accuracy in percent, a mean over seeds."""

    @property
    def words(self) -> str:
        return f"95 % interval {self.low:+.2f} to {self.high:+.2f}" + ("" if self.p is None else f", {p_text(self.p)}")


@dataclass(frozen=True)
class Standing:
    """One student, or the same student under several seeds."""

    name: str
    """Of its run, or of the first of its runs."""
    seeds: int
    role: str
    """As `Row.role`."""
    network: str | None
    teacher: str | None
    """The name of its teacher's network, where it is known."""
    by_neighbours: bool
    top1: float
    """In percent, a mean over seeds."""
    interval: tuple[float, float]
    """95 %: Wilson's, over several seeds of a bootstrap over seeds and images."""
    against_teacher: Difference | None
    against_control: Difference | None
    parameters: int | None
    megabytes: float | None
    """Of the exported file."""
    latency_ms: float | None
    """Of one image."""
    machine: str | None
    """Where that was measured."""
    ratios: Mapping[str, float]
    """Of student over teacher: 'parameters', 'gflops', and 'latency_ms', measured in turns; what is not known is left
    out.
    """

    @property
    def called(self) -> str:
        return self.name if self.seeds == 1 else f"{self.name} ({self.seeds} seeds)"

    @property
    def its_teacher(self) -> str:
        return "its teacher" if self.teacher is None else f"its teacher {self.teacher}"


def standings(comparison: Comparison) -> list[Standing]:
    """Of all students, the most accurate first; without any, of what else was trained."""
    found = [_standing(comparison, group) for group in groups_of(comparison) if group.students(comparison)]
    return sorted([each for each in found if each.role == STUDENT] or found, key=lambda each: -each.top1)


def _standing(comparison: Comparison, group: Group) -> Standing:
    students, teachers = group.students(comparison), group.teachers(comparison)
    first, labels = next(iter(students.values())), comparison.labels
    rights = [decisions(row.logits) == labels for row in students.values()]
    interval = (
        first.top1_interval if len(rights) == 1 else bootstrap_over_seeds([(right, ~right & False) for right in rights])
    )
    costs, measurement = comparison.costs(first), comparison.measurement(first)
    teacher = next(iter(teachers.values()), None)
    controls = {} if first.role != STUDENT else group.controls(comparison)
    return Standing(
        name=group.name,
        seeds=len(students),
        role=first.role,
        network=first.architecture,
        teacher=None if teacher is None else teacher.architecture,
        by_neighbours=first.by_neighbours,
        top1=float(np.mean([row.metrics.top1 for row in students.values()])),
        interval=interval,
        against_teacher=_difference(students, teachers, labels),
        against_control=_difference(students, controls, labels),
        parameters=first.parameters,
        megabytes=costs["megabytes"],
        latency_ms=costs["latency_ms"],
        machine=None if measurement is None else measurement.machine,
        ratios={} if teacher is None else _ratios(comparison, first, teacher),
    )


def _difference(students: BySeed, others: BySeed, labels: Ints) -> Difference | None:
    """Over the seeds that both have; None without any."""
    common = [seed for seed in students if seed in others]
    if not common:
        return None
    pairs = [tuple(decisions(rows[seed].logits) == labels for rows in (students, others)) for seed in common]
    other = float(np.mean([others[seed].metrics.top1 for seed in common]))
    if len(pairs) == 1:
        test = mcnemar("", "", *pairs[0])
        shown = _by_tests(test.points, test.p, test.p_equal)
        return Difference(test.points, test.low, test.high, test.p, shown, other)
    low, high = bootstrap_over_seeds([(a, b) for a, b in pairs])
    points = float(np.mean([students[seed].metrics.top1 for seed in common])) - other
    return Difference(points, low, high, None, _by_interval(low, high), other)


def _by_tests(points: float, p: float, p_equal: float) -> Shown:
    if p < SIGNIFICANT:
        return "better" if points > 0 else "worse"
    return "equal" if p_equal < SIGNIFICANT else "open"


def _by_interval(low: float, high: float) -> Shown:
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    return "equal" if max(-low, high) < EQUAL else "open"


def _ratios(comparison: Comparison, student: Row, teacher: Row) -> dict[str, float]:
    found = {}
    if student.parameters and teacher.parameters:
        found["parameters"] = student.parameters / teacher.parameters
    if (measurement := comparison.measurement(student, teacher)) is not None:
        ours, theirs = (measurement.costs[comparison.network(row)] for row in (student, teacher))
        for name in ("gflops", "latency_ms"):
            key, _ = UNITS[name]
            if ours[key] and theirs[key]:
                found[name] = ours[key] / theirs[key]
    return found
