"""Peak memory: a layer and a step with areas over without, distilling over not distilling, the data over their pixels.

On CUDA what the allocator counts. On a CPU the process's own peak of resident memory above what stood before, in a
process of its own (`python -m distill.bench.suites.memory SIZE ...`) in which the C library maps and unmaps every
tensor by itself, so that what is freed is gone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.bench import arms
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare
from distill.bench.suites.attention import AREAS, layer_arm
from distill.students.attention.area import AreaAttention

DEPTH = 20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(machine: Machine) -> Iterator[Row | Unmeasured]:
    if machine.device.type == "cuda":
        yield from _rows(machine)
    elif CLEAR.exists():
        command = [sys.executable, "-m", "distill.bench.suites.memory", *machine.sizes]
        child = subprocess.run(
            command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True, check=True
        )
        for line in child.stdout.splitlines():
            yield Row.of_json(json.loads(line))
    else:
        yield Unmeasured("peak memory", "<= 1.02, <= 1.05, <= 1.2", "needs Linux's /proc on a CPU, or CUDA")


def peak(work: Callable[[], object], device: torch.device) -> float:
    """Bytes that `work` needs at its worst, above what there is already."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    CLEAR.write_text("5")  # Linux: forget the peak so far (man 5 proc)
    before = _status("VmRSS")
    work()
    return float(_status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _rows(machine: Machine) -> Iterator[Row]:
    batch = 1024 if machine.device.type == "cuda" else 128
    for model in machine.sizes:
        layer = partial(layer_arm, machine, model, "fp32", batch)
        plain, areas = layer("ordinary attention", None), layer("areas of 2", AreaAttention, **AREAS["areas of 2"])
        measured = _peaks(machine, [plain, areas])
        yield _row(f"layer of {model}, batch {batch}, fp32", measured, areas, plain, Goal("<=", 1.2))
    student = arms.Student(machine.sizes[0], batch_size=batch)
    plain, areas, taught = (
        Arm(name, partial(_train, machine.device, student, sections))
        for name, sections in (
            ("ordinary attention", {}),
            ("areas of 2", {"student": {"attention": arms.AREAS}}),
            ("distilling", arms.distilling(f"cifar_resnet{DEPTH}")),
        )
    )
    where = f"training {student.model}/4 32 px, batch {batch}, fp32"
    measured = _peaks(machine, [plain, areas, taught])
    yield _row(where, measured, areas, plain, Goal("<=", 1.02))
    measured["not distilling"] = measured[plain.name]
    yield _row(where, measured, taught, plain._replace(name="not distilling"), Goal("<=", 1.05))
    yield _data_row(machine)


def _peaks(machine: Machine, measured: Sequence[Arm]) -> dict[str, list[float]]:
    """Bytes of every arm in every round."""
    for arm in measured:
        arm.run()  # what libraries keep after their first use
    peaks: dict[str, list[float]] = {arm.name: [] for arm in measured}
    for _ in range(machine.repetitions):
        for arm in measured:
            peaks[arm.name].append(peak(arm.run, machine.device))
    return peaks


def _row(name: str, measured: Mapping[str, list[float]], a: Arm, b: Arm, goal: Goal) -> Row:
    return compare(f"memory, {name}", measured, a, b, of="bytes", goal=goal)


def _train(device: torch.device, student: arms.Student, sections: Mapping[str, Any]) -> None:
    """Two steps from nothing: weights, gradients, optimizer state and activations."""
    accelerator = arms.accelerator(student.precision)
    teacher = arms.build_teacher(DEPTH, device) if "teacher" in sections else None
    trainer = arms.build_trainer(student.recipe(**sections), accelerator, teacher=teacher)
    for _, batch in zip(range(2), arms.endless_batches(trainer), strict=False):
        trainer.train_step(batch)
    accelerator.free_memory()


def _data_row(machine: Machine) -> Row:
    """An epoch of batches out of resident data, over the bytes of their pixels."""
    recipe = arms.Student().recipe()
    images = 40_000
    size = images * 3 * 32 * 32

    def read() -> None:
        data = arms.resident_data(recipe, machine.device, images)
        for start in range(0, images, 4000):
            for pixels, _ in data.evaluation_batches("train", start, start + 4000, 128):
                pixels.sum()

    read()
    measured = {"an epoch": [peak(read, machine.device) for _ in range(machine.repetitions)]}
    measured["its pixels"] = [float(size)] * machine.repetitions
    arm_a, arm_b = (Arm(name, read) for name in measured)
    return compare("memory, resident data", measured, arm_a, arm_b, of="bytes", goal=Goal("<=", 1.1))


if __name__ == "__main__":
    here = Machine(torch.device("cpu"), tuple(sys.argv[1:]), Path())
    for row in _rows(here):
        print(json.dumps(row.as_json()), flush=True)
