"""Ratios of two arms, measured side by side: every round runs each arm once, so that what disturbs the machine disturbs
all arms alike, and a ratio is taken within its round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

import torch


class Arm(NamedTuple):
    """Something to be timed."""

    name: str
    run: Callable[[], object]
    """What one repetition consists of."""
    units: float = 1.0
    """Images (or whatever speeds are counted in) of one repetition."""
    flops: float = 0.0
    """Floating-point operations of one unit, for the share of the matrix rate; 0: not counted."""
    before: Callable[[], object] | None = None
    """What a round begins with, outside the time: starting loader processes, first steps."""
    after: Callable[[], object] | None = None


@dataclass(frozen=True)
class Goal:
    """A bound that an issue, or whoever reads the table, expects a figure to keep."""

    relation: Literal["<=", ">="]
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.relation == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"

    @classmethod
    def of_text(cls, text: str | None) -> Goal | None:
        """The goal that says so of itself; None: no goal."""
        if text is None:
            return None
        relation, bound = text.split()
        return cls("<=" if relation == "<=" else ">=", float(bound))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    arm_a: str
    arm_b: str
    ratio: float
    """Median over the rounds of arm a over arm b."""
    spread: tuple[float, float]
    """First and third quartile over the rounds."""
    repetitions: int
    goal: Goal | None = None
    details: Mapping[str, Any] | None = None
    """What the ratio was made of: speeds of both arms, their shares of the matrix rate."""

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met(self.ratio)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "arm_a": self.arm_a,
            "arm_b": self.arm_b,
            "ratio": self.ratio,
            "spread": list(self.spread),
            "repetitions": self.repetitions,
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            **(self.details or {}),
        }

    @classmethod
    def of_json(cls, line: Mapping[str, Any]) -> Row:
        """The row that `as_json` made this of."""
        values = dict(line)
        del values["met"]
        goal = Goal.of_text(values.pop("goal"))
        own = {key: values.pop(key) for key in ("name", "arm_a", "arm_b", "ratio", "repetitions")}
        return cls(**own, spread=tuple(values.pop("spread")), goal=goal, details=values)


@dataclass(frozen=True)
class Unmeasured:
    """A goal that this machine cannot show."""

    name: str
    goal: str
    reason: str


def seconds(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean seconds of one of `times` runs in a row: by events on CUDA, by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - began) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000 / times


def interleave(
    arms: Sequence[Arm], device: torch.device, *, repetitions: int = 5, times: int = 1, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds per unit of every arm in every round; every second round runs backwards, so that no arm is always after
    the same other one.
    """
    for arm in arms:
        if warm_up:
            _round(arm, device, warm_up)
    measured: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(repetitions):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            measured[arm.name].append(_round(arm, device, times))
    return measured


def _round(arm: Arm, device: torch.device, times: int) -> float:
    if arm.before is not None:
        arm.before()
    try:
        return seconds(arm.run, device, times) / arm.units
    finally:
        if arm.after is not None:
            arm.after()


def summary(ratios: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median, and first and third quartile."""
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return median(ratios), (low, high)


def compare(
    name: str,
    measured: Mapping[str, Sequence[float]],
    arm_a: Arm,
    arm_b: Arm,
    *,
    of: Literal["time", "speed", "bytes"],
    goal: Goal | None = None,
    matrix_rate: float | None = None,
) -> Row:
    """The row of two arms out of the rounds: their times, their speeds or their peaks of memory, divided.

    `matrix_rate`: of the machine, in FLOP/s, where the share of it that each arm reached is to be told.
    """
    a, b = measured[arm_a.name], measured[arm_b.name]
    ratio, spread = summary([y / x if of == "speed" else x / y for x, y in zip(a, b, strict=True)])
    details: dict[str, Any] = {"of": of}
    if of == "bytes":
        details["bytes"] = [median(a), median(b)]
    else:
        details["per_second"] = [1 / median(a), 1 / median(b)]
    if matrix_rate is not None:
        details["share_of_matrix_rate"] = [
            arm.flops / median(times) / matrix_rate for arm, times in ((arm_a, a), (arm_b, b))
        ]
    return Row(name, arm_a.name, arm_b.name, ratio, spread, len(a), goal, details)
