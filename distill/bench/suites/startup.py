"""How soon something happens: the light commands, and the first training step of the quickstart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import yaml

from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave, summary

COMMAND = (sys.executable, "-m", "distill.cli")
IMPORTS = "import torch, torchvision, timm, accelerate"
RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def measure(machine: Machine) -> Iterator[Row | Unmeasured]:
    recipe = RECIPES / "quickstart.yaml"
    if not recipe.exists():
        yield Unmeasured("startup", "< 0.5 s, < 1 s, < 2x the imports", "needs recipes/quickstart.yaml of a checkout")
        return
    for arguments, bound in ((["--help"], 0.5), (["validate", str(recipe)], 1.0)):
        name = f"distill {arguments[0]}"
        arm = Arm(name, partial(_run, [*COMMAND, *arguments], machine.scratch))
        taken = interleave([arm], machine.device, repetitions=machine.repetitions)[name]
        middle, spread = summary(taken)
        yield Row(f"startup, {name}", name, "one second", middle, spread, len(taken), Goal("<=", bound))
    launch = _prepare(machine.scratch, recipe)
    step, imports = (Arm(name, lambda: None) for name in ("first step of the quickstart", "bare imports"))
    measured: dict[str, list[float]] = {step.name: [], imports.name: []}
    for turn in range(machine.repetitions):
        measured[step.name].append(_until_first_step(launch, machine.scratch, f"run{turn}"))
        began = time.perf_counter()
        _run([sys.executable, "-c", IMPORTS], machine.scratch)
        measured[imports.name].append(time.perf_counter() - began)
    yield compare("startup, first step", measured, step, imports, of="time", goal=Goal("<=", 2))


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def _prepare(folder: Path, recipe: Path) -> list[str]:
    """The quickstart's command, with its data packed and its teacher trained (for one step: its accuracy does not
    matter here).
    """
    teacher = yaml.safe_load((RECIPES / "teachers" / "digits_cnn.yaml").read_text(encoding="utf-8"))
    teacher["train"]["max_steps"] = 1
    short = folder / "teacher.yaml"
    short.write_text(yaml.safe_dump(teacher), encoding="utf-8")
    overrides = [f"teacher.recipe={short}", "teacher.min_accuracy=0.0", "train.log_every=1"]
    command = [*COMMAND, "train", str(recipe), *overrides]
    _run([*command, "train.max_steps=1", "control=false", "--out", "prepared"], folder)
    return command


def _until_first_step(command: Sequence[str], folder: Path, name: str) -> float:
    """Seconds from the start of the process to the line that its first step leaves in metrics.jsonl."""
    metrics = folder / name / "metrics.jsonl"
    began = time.time()
    process = subprocess.Popen(
        [*command, "--out", name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
            for line in map(json.loads, text.rpartition("\n")[0].splitlines()):
                if line["event"] == "train":
                    return line["time"] - began
            time.sleep(0.02)
        raise RuntimeError(f"the quickstart ended with code {process.returncode} before its first step")
    finally:
        process.kill()
        process.wait()
