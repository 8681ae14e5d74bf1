"""Ratios out of interleaved rounds, rows as JSON, tables."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave, summary
from distill.bench.scaling import GPUS, Assumptions, computed
from distill.bench.table import render_markdown

CPU = torch.device("cpu")


def test_every_round_runs_every_arm_once_and_every_second_round_backwards() -> None:
    seen: list[str] = []
    arms = [Arm(name, lambda name=name: seen.append(name)) for name in "abc"]
    times = interleave(arms, CPU, repetitions=4, warm_up=2)
    assert "".join(seen) == "aabbcc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_comes_before_and_after_a_round_is_not_in_its_time() -> None:
    seen: list[str] = []

    def slow(word: str) -> None:
        seen.append(word)
        time.sleep(0.05)

    arm = Arm("x", lambda: seen.append("run"), before=lambda: slow("before"), after=lambda: slow("after"))
    (times,) = interleave([arm], CPU, repetitions=2, times=3, warm_up=1).values()
    assert seen == ["before", "run", "after"] + 2 * ["before", "run", "run", "run", "after"]
    assert max(times) < 0.05


def test_the_end_of_a_round_is_reached_when_it_fails() -> None:
    seen: list[str] = []
    arm = Arm("x", lambda: 1 / 0, after=lambda: seen.append("after"))
    with pytest.raises(ZeroDivisionError):
        interleave([arm], CPU)
    assert seen == ["after"]


def test_time_is_told_for_one_unit() -> None:
    arm = Arm("sleep", lambda: time.sleep(0.02), units=4)
    (rounds,) = interleave([arm], CPU, repetitions=2, times=2, warm_up=0).values()
    assert all(0.02 <= 4 * taken < 0.2 for taken in rounds)


@pytest.mark.parametrize(("of", "ratio"), [("time", 2.0), ("speed", 0.5), ("bytes", 2.0)])
def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds(of: str, ratio: float) -> None:
    a, b = Arm("a", lambda: None, flops=10.0), Arm("b", lambda: None, flops=30.0)
    # Twice as long in four of five rounds, though the machine was ten times slower in one of them.
    measured = {"a": [2.0, 20.0, 2.0, 2.0, 7.0], "b": [1.0, 10.0, 1.0, 1.0, 1.0]}
    row = compare("x", measured, a, b, of=of, goal=Goal("<=", 2.0), matrix_rate=100.0)  # type: ignore[arg-type]
    assert row.ratio == ratio
    assert row.met is True
    assert (row.arm_a, row.arm_b, row.repetitions) == ("a", "b", 5)
    assert row.details is not None
    assert row.details["share_of_matrix_rate"] == [10 / 2 / 100, 30 / 1 / 100]


def test_the_spread_is_that_of_the_quartiles() -> None:
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, (2.0, 4.0))


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("<=", 1.02), 1.02, True),
        (Goal("<=", 1.02), 1.021, False),
        (Goal(">=", 5), 5.0, True),
        (Goal(">=", 5), 4.99, False),
    ],
)
def test_goals(goal: Goal, value: float, met: bool) -> None:
    assert goal.met(value) is met
    assert Goal.of_text(str(goal)) == goal


@pytest.mark.parametrize("goal", [None, Goal(">=", 1.05)])
def test_a_row_survives_json(goal: Goal | None) -> None:
    row = Row("x", "a", "b", 1.2, (1.1, 1.3), 5, goal, {"of": "time", "per_second": [1.0, 2.0]})
    line = row.as_json()
    assert {"name", "arm_a", "arm_b", "ratio", "spread", "repetitions", "goal", "met"} <= set(line)
    assert line["met"] is (None if goal is None else True)
    assert Row.of_json(line) == row


def test_the_table_has_a_line_for_all_that_was_found() -> None:
    machine = {"device_name": "C", "threads": 2, "matrix_gflops": {"fp32": 1234.5}, "versions": {"torch": "9.9"}}
    rows = [
        Row("one", "a", "b", 1.25, (1.2, 1.3), 5, Goal(">=", 1.3), {"per_second": [12.5, 1234.0]}),
        Row("two", "c", "d", 0.5, (0.4, 0.6), 5, None, {"bytes": [2**20, 2**21], "waiting_for_data": 0.123}),
    ]
    growth = {
        "what": "x",
        "assumptions": {"flop_per_second": 1e14},
        "rows": [{"gpus": 2, "speed": 1.9876, "all_reduce_share": 0.0062}],
    }
    text = render_markdown(machine, rows, [Unmeasured("three", ">= 3", "needs CUDA")], growth)
    lines = text.splitlines()
    assert lines[0] == "C, 2 threads; matrix products 1,234 GFLOP/s in fp32; torch 9.9."
    assert lines[4] == "| one | a over b | 1.250 | 1.200 to 1.300 | >= 1.3 | no | 12.5/s, 1,234/s |  |"
    assert "1 MiB, 2 MiB" in lines[5]
    assert "12.3% of the time waiting for data" in lines[5]
    assert lines[7] == "- not measured: three, >= 3: needs CUDA"
    assert lines[-3] == "| 2 | 1.99 | 0.6% |"
    assert lines[-1] == "Assumed of each GPU: flop_per_second 1e+14."


def test_growth_beyond_one_machine_follows_the_ring() -> None:
    result = computed()
    rows = result["rows"]
    assert [row["gpus"] for row in rows] == list(GPUS)
    assert all(0 < row["all_reduce_share"] < 1 and row["speed"] < row["gpus"] for row in rows)
    assert all(earlier["speed"] < later["speed"] for earlier, later in pairwise(rows))
    # By hand for two GPUs: each sends and receives half of 5,365,076 gradients twice.
    assumed = Assumptions()
    reduce = 4 * 5_365_076 / assumed.bytes_per_second_within_node
    images = assumed.images_per_gpu * (3 * 0.7413e9 + 0.2509e9) / assumed.flop_per_second
    assert rows[0]["speed"] == pytest.approx(2 * images / (images + reduce), rel=1e-3)
