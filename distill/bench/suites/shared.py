"""A machine that is shared: the speed of training beside a busy process, and what the default number of threads costs
where nothing else runs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.suites.startup import COMMAND, RECIPES, first_lines
from distill.console import say
from distill.cores import share_of_cores

NAME = "training on a shared machine"
LINES = 4
"""Lines of metrics of a run; the first one is not counted."""
ROUNDS = 3


def measure(machine: Machine) -> Iterator[Row]:
    recipe = RECIPES / "teachers" / "digits_cnn.yaml"
    if machine.on_cuda or not recipe.exists():
        say("shared is left out: it is about CPUs, and needs recipes/teachers/digits_cnn.yaml of a checkout.")
        return
    if not machine.wants(NAME):
        return
    folders = (machine.scratch / f"shared{number}" for number in itertools.count())
    arms = {
        Arm(f"{threads}, {where}", lambda: None): (busy, overrides)
        for where, busy in (("alone", 0), ("beside one busy process", 1))
        for threads, overrides in (("default", []), ("a thread a core", [f"train.threads={share_of_cores()}"]))
    }
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(min(ROUNDS, machine.repetitions)):
        for arm, (busy, overrides) in arms.items():
            with _busy_processes(busy):
                times[arm.name].append(
                    1 / _images_per_second([*COMMAND, "train", str(recipe), *overrides], next(folders))
                )
    alone, all_cores, beside, all_cores_beside = arms
    for a, b in ((beside, alone), (alone, all_cores), (beside, all_cores_beside)):
        yield compare(NAME, times, a, b, of="speed")


@contextmanager
def _busy_processes(number: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _images_per_second(command: list[str], folder: Path) -> float:
    """The median of some lines of metrics."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    lines = first_lines([*command, "train.log_every=10"], folder, LINES, environment)
    return median(line["images_per_second"] for line in lines[1:])
