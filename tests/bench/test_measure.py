"""Ratios out of interleaved rounds, and their table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distill.bench.measure import Arm, Machine, compare, table


def machine(repetitions: int) -> Machine:
    return Machine(torch.device("cpu"), (), Path(), 128, repetitions)


def test_every_round_runs_every_arm_once_and_every_second_round_backwards() -> None:
    seen: list[str] = []
    arms = [Arm(name, lambda name=name: seen.append(name)) for name in "abc"]
    times = machine(4).interleave(arms, warm_up=2)
    assert "".join(seen) == "aabbcc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_a_round_runs_in_is_not_in_its_time() -> None:
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("before")
        time.sleep(0.05)
        yield
        time.sleep(0.05)
        seen.append("after")

    arm = Arm("x", lambda: seen.append("run"), around=around)
    (times,) = machine(2).interleave([arm], times=3).values()
    assert seen == ["before", "run", "after"] + 2 * ["before", "run", "run", "run", "after"]
    assert max(times) < 0.05


def test_time_is_told_for_one_unit() -> None:
    arm = Arm("sleep", lambda: time.sleep(0.02), units=4)
    (rounds,) = machine(2).interleave([arm], times=2, warm_up=0).values()
    assert all(0.02 <= 4 * taken < 0.2 for taken in rounds)


@pytest.mark.parametrize(("of", "ratio"), [("time", 2.0), ("speed", 0.5), ("bytes", 2.0)])
def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds(of: str, ratio: float) -> None:
    a, b = Arm("a", lambda: None, flops=10.0), Arm("b", lambda: None, flops=30.0)
    # Twice as long in four of five rounds, though the machine was ten times slower in one of them.
    measured = {"a": [2.0, 20.0, 2.0, 2.0, 7.0], "b": [1.0, 10.0, 1.0, 1.0, 1.0]}
    row = compare("x", measured, a, b, of=of, matrix_rate=100.0)  # type: ignore[arg-type]
    assert row["ratio"] == ratio
    assert (row["name"], row["arm_a"], row["arm_b"], row["repetitions"]) == ("x", "a", "b", 5)
    assert row["share_of_matrix_rate"] == [10 / 2 / 100, 30 / 1 / 100]


def test_the_spread_is_that_of_the_quartiles() -> None:
    a, b = (Arm(name, lambda: None) for name in "ab")
    row = compare("x", {"a": [5.0, 1.0, 2.0, 3.0, 4.0], "b": [1.0] * 5}, a, b, of="time")
    assert (row["ratio"], row["spread"]) == (3.0, [2.0, 4.0])


def test_the_table_has_a_line_for_each_row() -> None:
    common = {"arm_a": "a", "arm_b": "b", "repetitions": 5}
    rows = [
        common | {"name": "one", "ratio": 1.25, "spread": [1.2, 1.3], "of": "time", "per_second": [12.5, 1234.0]},
        common | {"name": "two", "ratio": 0.5, "spread": [0.4, 0.6], "of": "bytes", "bytes": [2**20, 2**21]},
        common
        | {"name": "three", "ratio": 0.5, "spread": [0.4, 0.6], "of": "speed"}
        | {"per_second": [1e11, 2e11], "share_of_matrix_rate": [0.5, 1.0]},
    ]
    assert table(rows).splitlines()[2:] == [
        "| one | a over b | 1.250 | 1.200 to 1.300 | 12.5/s, 1,234/s |  |",
        "| two | a over b | 0.500 | 0.400 to 0.600 | 1 MiB, 2 MiB |  |",
        "| three | a over b | 0.500 | 0.400 to 0.600 | 100 G/s, 200 G/s | 50%, 100% |",
    ]


def test_the_matrix_rate_is_measured_once() -> None:
    here = machine(2)
    assert here.matrix_rates == {}
    rate = here.matrix_rate("fp32")
    assert rate > 0
    assert here.matrix_rate("fp32") == rate == here.matrix_rates["fp32"]


@pytest.mark.parametrize(("instructions", "measured"), [(None, ("fp32",)), ("amx_bf16", ("fp32", "bf16"))])
def test_a_cpu_that_emulates_bf16_is_not_measured_in_it(
    instructions: str | None, measured: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.bench.measure.bf16_instructions", lambda: instructions)
    assert machine(2).precisions == machine(2).step_precisions == measured
