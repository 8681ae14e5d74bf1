"""Peak memory: a layer and a step with areas over without, distilling over not distilling, the data over their pixels.

On CUDA what the allocator counts. On a CPU the process's own peak of resident memory above what stood before, in a
process of its own, in which the C library maps and unmaps every tensor by itself, so that what is freed is gone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.suites.attention import layer_arm
from distill.console import say
from distill.recipe import Recipe
from distill.students.attention.area import AreaAttention

DEPTH = 20
IMAGES = 40_000
DATA = "memory, resident data"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(machine: Machine) -> Iterator[Row]:
    if machine.on_cuda:
        yield from _rows(machine)
    elif CLEAR.exists():
        command = [sys.executable, "-m", "distill.bench.suites.memory", *machine.sizes]
        command += [str(machine.batch_size), str(machine.repetitions), machine.only or ""]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        yield from map(json.loads, child.stdout.splitlines())
    else:
        say("memory is left out: on a CPU it needs Linux's /proc.")


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
    for model in machine.sizes:
        name = f"memory, layer of {model}, batch {machine.batch_size}, fp32"
        if not machine.wants(name):
            continue
        layer = partial(layer_arm, machine, model, "fp32")
        plain, areas = layer("ordinary attention", None), layer("areas of 2", AreaAttention, 2)
        peaks = _peaks(machine, [plain, areas])
        yield compare(name, peaks, areas, plain, of="bytes")
    yield from _training(machine)
    yield from _data(machine)


def _training(machine: Machine) -> Iterator[Row]:
    student = arms.Student(machine.sizes[0], batch_size=machine.batch_size)
    where = f"memory, training {student.model}/4 32 px, batch {student.batch_size}, fp32"
    if not machine.wants(where):
        return
    plain, areas, taught, dino = (
        Arm(name, partial(_train, student.recipe(**sections), machine.device))
        for name, sections in (
            ("ordinary attention", {}),
            ("areas of 2", arms.with_areas()),
            ("distilling", arms.distilling(DEPTH)),
            ("dino, 2 + 8 views", arms.self_distilling()),
        )
    )
    peaks = _peaks(machine, [plain, areas, taught, dino])
    untaught = plain._replace(name="not distilling")
    peaks[untaught.name] = peaks[plain.name]
    for a, b in ((areas, plain), (taught, untaught), (dino, untaught)):
        yield compare(where, peaks, a, b, of="bytes")


def _data(machine: Machine) -> Iterator[Row]:
    if not machine.wants(DATA):
        return
    epoch = Arm("an epoch", partial(_read, machine.device))
    pixels = epoch._replace(name="its pixels")
    peaks = _peaks(machine, [epoch]) | {pixels.name: [IMAGES * 3 * 32 * 32.0] * machine.repetitions}
    yield compare(DATA, peaks, epoch, pixels, of="bytes")


def _peaks(machine: Machine, measured: Sequence[Arm]) -> dict[str, list[float]]:
    """Bytes of every arm in every round."""
    for arm in measured:
        arm.run()  # what libraries keep after their first use
    rounds = [[peak(arm.run, machine.device) for arm in measured] for _ in range(machine.repetitions)]
    return {arm.name: list(peaks) for arm, peaks in zip(measured, zip(*rounds, strict=True), strict=True)}


def _train(recipe: Recipe, device: torch.device) -> None:
    """Two steps from nothing: weights, gradients, optimizer state and activations."""
    teacher = arms.build_teacher(DEPTH, device) if recipe.teachers else None
    trainer = arms.build_trainer(recipe, arms.accelerator("fp32"), teacher)
    batches = arms.endless_batches(trainer)
    for _ in range(2):
        trainer.train_step(next(batches))


def _read(device: torch.device) -> None:
    """An epoch of batches out of resident data."""
    data = arms.resident_data(arms.Student().recipe(), device, IMAGES)
    for pixels, _ in data.evaluation_batches("train", 0, IMAGES, 128):
        pixels.sum()


if __name__ == "__main__":
    *sizes, batch_size, repetitions, only = sys.argv[1:]
    machine = Machine(torch.device("cpu"), tuple(sizes), Path(), int(batch_size), int(repetitions), only)
    for row in _rows(machine):
        print(json.dumps(row), flush=True)
