"""Ratios of two arms, measured side by side: every round runs each arm once, so that what disturbs the machine disturbs
all arms alike, and a ratio is taken within its round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

import torch

from distill.launching.processes import bf16_instructions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}

Row = dict[str, Any]
"""One line of the table, as it stands in the JSON; see `compare`."""


class Arm(NamedTuple):
    """Something to be timed."""

    name: str
    run: Callable[[], object]
    """What one repetition consists of."""
    units: float = 1.0
    """Images (or whatever speeds are counted in) of one repetition."""
    flops: float = 0.0
    """Floating-point operations of one unit, for the share of the matrix rate."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What a round runs in, outside of its time: loader processes, first steps."""


@dataclass(frozen=True)
class Machine:
    """Where and on what the suites measure."""

    device: torch.device
    sizes: tuple[str, ...]
    """Students, as vit_<size>."""
    scratch: Path
    """A folder of their own."""
    batch_size: int
    """Of most training steps and layers."""
    repetitions: int = 3
    """Rounds."""
    only: str | None = None
    """Which rows: those whose name has this in it; * stands for anything."""
    matrix_rates: dict[str, float] = field(default_factory=dict)
    """FLOP/s of a large matrix product by precision, of those that were asked for."""

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wants(self, *names: str) -> bool:
        """Whether a row of one of these names is asked for."""
        pattern = f"*{(self.only or '').lower()}*"
        return any(fnmatchcase(name.lower(), pattern) for name in names)

    def batch_of(self, model: str) -> int:
        """Images of a training step; on a CPU fewer for students larger than vit_nano, whose steps take long."""
        return self.batch_size if self.on_cuda or model == "vit_nano" else self.batch_size // 4

    @property
    def precisions(self) -> tuple[str, ...]:
        """As in training, bf16 is left out on a CPU that would have to emulate it."""
        return ("fp32", "bf16") if self.on_cuda or bf16_instructions() else ("fp32",)

    @property
    def step_precisions(self) -> tuple[str, ...]:
        """Those that students are trained in here."""
        return ("bf16",) if self.on_cuda else self.precisions

    def interleave(
        self, arms: Sequence[Arm], *, times: int | None = None, warm_up: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds per unit of every arm in every round; every second round runs backwards, so that no arm is always
        after the same other one.

        Args:
            times: repetitions in a row, of which a round takes the mean; by default 20 on CUDA, where a step is too
                short to be timed, and 1 on a CPU.
            warm_up: repetitions before the first round; by default 12 on CUDA, where steps are compiled and recorded
                as graphs, and 1 on a CPU.
        """
        times = times or (20 if self.on_cuda else 1)
        warm_up = (12 if self.on_cuda else 1) if warm_up is None else warm_up
        if warm_up:
            for arm in arms:
                self._round(arm, warm_up)
        measured: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for turn in range(self.repetitions):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                measured[arm.name].append(self._round(arm, times))
        return measured

    def _round(self, arm: Arm, times: int) -> float:
        wait = torch.cuda.synchronize if self.on_cuda else lambda: None
        with arm.around():
            wait()
            began = time.perf_counter()
            for _ in range(times):
                arm.run()
            wait()
            return (time.perf_counter() - began) / times / arm.units

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of a large matrix product, measured once: the median of the rounds."""
        if precision not in self.matrix_rates:
            arm = self.matrix_product(precision)
            self.matrix_rates[precision] = arm.flops / median(self.interleave([arm], times=3)[arm.name])
        return self.matrix_rates[precision]

    def matrix_product(self, precision: str) -> Arm:
        """A large square one: the yardstick of every share of the machine's rate."""
        side, dtype = MATRIX_SIDE[self.device.type], DTYPES[precision]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        return Arm(f"matrix product {precision}", lambda: a @ b, flops=2.0 * side**3)


def compare(
    name: str,
    measured: Mapping[str, Sequence[float]],
    arm_a: Arm,
    arm_b: Arm,
    *,
    of: Literal["time", "speed", "bytes"],
    matrix_rate: float | None = None,
) -> Row:
    """The row of two arms out of the rounds: their times, their speeds or their peaks of memory, divided.

    `ratio` is the median over the rounds, `spread` the first and third quartile; of each arm there are its units per
    second, or its bytes, and the share that it reached of `matrix_rate`, in FLOP/s, where that is given.
    """
    a, b = measured[arm_a.name], measured[arm_b.name]
    ratios = [y / x if of == "speed" else x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    each = [median(a), median(b)]
    row: Row = {"name": name, "arm_a": arm_a.name, "arm_b": arm_b.name, "ratio": middle, "spread": [low, high]}
    row |= {"repetitions": len(ratios), "of": of}
    row |= {"bytes": each} if of == "bytes" else {"per_second": [1 / seconds for seconds in each]}
    if matrix_rate is not None:
        row["share_of_matrix_rate"] = [arm_a.flops / each[0] / matrix_rate, arm_b.flops / each[1] / matrix_rate]
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    header = ["what", "A over B", "ratio", "spread", "A, B", "share of the matrix rate"]
    lines = [header, ["---"] * len(header), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    sizes = [f"{size / 2**20:,.0f} MiB" for size in row.get("bytes", ())]
    speeds = [_speed(speed) for speed in row.get("per_second", ())]
    shares = ", ".join(f"{share:.0%}" for share in row.get("share_of_matrix_rate", ()))
    over = f"{row['arm_a']} over {row['arm_b']}"
    spread = " to ".join(f"{quartile:.3f}" for quartile in row["spread"])
    return [row["name"], over, f"{row['ratio']:.3f}", spread, ", ".join(sizes or speeds), shares]


def _speed(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:,.0f} G/s"
    return f"{value:,.3g}/s" if value < 100 else f"{value:,.0f}/s"
