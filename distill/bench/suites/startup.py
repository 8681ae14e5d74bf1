"""How soon something happens: the light commands, and the first training step of the quickstart."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from distill.bench.measure import Arm, Machine, Row, compare
from distill.console import say
from distill.run import read_metrics

COMMAND = (sys.executable, "-m", "distill.cli")
IMPORTS = "import torch, torchvision, timm, accelerate"
FIRST_STEP = "startup, first step"
RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def measure(machine: Machine) -> Iterator[Row]:
    recipe = RECIPES / "quickstart.yaml"
    if not recipe.exists():
        say("startup is left out: it needs recipes/quickstart.yaml of a checkout.")
        return
    run = partial(subprocess.run, cwd=machine.scratch, check=True, capture_output=True)
    for arguments in (["--help"], ["validate", str(recipe)]):
        name = f"startup, distill {arguments[0]}"
        if not machine.wants(name):
            continue
        arm = Arm(f"distill {arguments[0]}", partial(run, [*COMMAND, *arguments]))
        second = arm._replace(name="one second")
        times = machine.interleave([arm], times=1) | {second.name: [1.0] * machine.repetitions}
        yield compare(name, times, arm, second, of="time")
    if not machine.wants(FIRST_STEP):
        return
    # Its teacher is trained before, for one step: its accuracy does not matter here.
    short = machine.scratch / "teacher.yaml"
    short.write_text(f"base: {RECIPES}/teachers/digits_cnn.yaml\ntrain: {{max_steps: 1}}\n", encoding="utf-8")
    overrides = [f"teacher.recipe={short}", "teacher.min_accuracy=0.0", "train.log_every=1"]
    command = [*COMMAND, "train", str(recipe), *overrides]
    run([*command, "train.max_steps=1", "control=false", "--out", "prepared"])
    folders = (machine.scratch / f"run{number}" for number in itertools.count())
    step = Arm("first step of the quickstart", lambda: first_lines(command, next(folders)))
    imports = Arm("bare imports", partial(run, [sys.executable, "-c", IMPORTS]))
    times = machine.interleave([step, imports], times=1, warm_up=0)
    yield compare(FIRST_STEP, times, step, imports, of="time")


def first_lines(
    command: list[str], folder: Path, number: int = 1, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Train in `folder` until there are so many lines of metrics, and no further; returns them."""
    command = [*command, "--out", str(folder)]
    process = subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while len(lines := list(read_metrics(folder, "train"))) < number:
            if (code := process.poll()) is not None:
                raise RuntimeError(f"the training ended with code {code} after {len(lines)} lines of metrics")
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    return lines
