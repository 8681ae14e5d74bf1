"""The training step alone, on one fixed batch: area attention over ordinary, compiled over eager, each distillation
method over plain training, and how near the step comes to the machine's matrix rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from distill.bench import arms
from distill.bench.flops import TRAINING, vit_forward
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave
from distill.bench.methods import measure_methods
from distill.bench.suites.attention import AREAS

ORDINARY = {"kind": "standard"}
CPU_GOALS = {"vit_tiny": 1.03, "vit_nano": 1.12}
CUDA_GOALS = {32: 1.02, 224: 1.03}
CPU_SHARES = {"fp32": 0.8, "bf16": 0.6}
CUDA_SHARES = {("vit_tiny", 32): 0.15, ("vit_small", 224): 0.30}


def measure(machine: Machine) -> Iterator[Row | Unmeasured]:
    cuda = machine.device.type == "cuda"
    for precision in ("bf16",) if cuda else machine.precisions:
        accelerator = arms.accelerator(precision)
        for student in _students(machine, precision):
            yield from _area_over_plain(machine, accelerator, student)
        accelerator.free_memory()
    yield from measure_methods(machine)
    yield from _growth(machine)
    if cuda:
        yield from _compiled_over_eager(machine)
    else:
        for bound, batch in ((1.5, 1024), (3, 128)):
            yield Unmeasured("compiled over eager step", f">= {bound} at batch {batch}", "needs CUDA")


def _students(machine: Machine, precision: str) -> Iterator[arms.Student]:
    for model in machine.sizes:
        yield arms.Student(model, precision=precision, batch_size=1024 if machine.device.type == "cuda" else 128)
    if machine.device.type == "cuda":
        yield arms.Student("vit_small", 16, 224, 256, precision)


def step_arm(name: str, student: arms.Student, accelerator: Accelerator, attention: Mapping[str, Any]) -> Arm:
    """A student's training steps on one batch."""
    trainer = arms.build_trainer(student.recipe(student={"attention": attention}), accelerator)
    batch = arms.fixed_batch(trainer)
    flops = TRAINING * vit_forward(trainer.recipe.student, resolution=student.resolution, num_classes=arms.NUM_CLASSES)
    return Arm(name, lambda: trainer.train_step(batch), student.batch_size, flops)


def _area_over_plain(machine: Machine, accelerator: Accelerator, student: arms.Student) -> Iterator[Row]:
    plain = step_arm("ordinary attention", student, accelerator, ORDINARY)
    areas = [
        step_arm(name, student, accelerator, {"kind": "area", "blocks": [0, 1], **options})
        for name, options in AREAS.items()
    ]
    product = machine.matrix_product(student.precision)
    times = interleave([plain, *areas, product], machine.device, **machine.rounds)
    cuda = machine.device.type == "cuda"
    bound = CUDA_GOALS[student.resolution] if cuda else CPU_GOALS.get(student.model)
    where = f"{student.model}/{student.patch_size} {student.resolution} px {student.precision}"
    for arm in areas:
        goal = Goal("<=", bound) if arm is areas[0] and bound else None
        rate = machine.matrix_rates[student.precision]
        yield compare(f"step, {where}", times, arm, plain, of="time", goal=goal, matrix_rate=rate)
    shares = CUDA_SHARES.get((student.model, student.resolution)) if cuda else CPU_SHARES[student.precision]
    goal = Goal(">=", shares) if shares and (cuda or student.model == "vit_tiny") else None
    # Both arms in FLOP/s: the ratio of their speeds is the share of the rate, taken round by round.
    per_flop = {arm.name: [time / arm.flops for time in times[arm.name]] for arm in (plain, product)}
    yield compare(f"share of the matrix rate, {where}", per_flop, plain, product, of="speed", goal=goal)


def _growth(machine: Machine) -> Iterator[Row]:
    """Images per second at other batch sizes and resolutions over those of one student."""
    cuda = machine.device.type == "cuda"
    precision = machine.precisions[-1]
    student = arms.Student(machine.sizes[0], precision=precision, batch_size=1024 if cuda else 128)
    accelerator = arms.accelerator(precision)
    batches = [replace(student, batch_size=student.batch_size * factor // 4) for factor in (1, 4, 16)]
    shapes = [
        replace(student, patch_size=8),
        student,
        replace(student, resolution=64, batch_size=student.batch_size // 4),
    ]
    for what, students in (("batch", batches), ("tokens", shapes)):
        measured = [
            step_arm(f"{one.resolution} px, patch {one.patch_size}, batch {one.batch_size}", one, accelerator, ORDINARY)
            for one in students
        ]
        times = interleave(measured, machine.device, **machine.rounds)
        rate = machine.matrix_rates[precision]
        for arm in (measured[0], measured[2]):
            name = f"growth with {what}, {student.model} {precision}"
            yield compare(name, times, arm, measured[1], of="speed", matrix_rate=rate)
    accelerator.free_memory()


def _compiled_over_eager(machine: Machine) -> Iterator[Row]:
    accelerator = arms.accelerator("bf16")
    for batch, bound in ((1024, 1.5), (128, 3.0)):
        student = arms.Student("vit_tiny", precision="bf16", batch_size=batch, compile=True)
        compiled = step_arm("compiled", student, accelerator, ORDINARY)
        eager = step_arm("eager", replace(student, compile=False), accelerator, ORDINARY)
        times = interleave([compiled, eager], machine.device, **machine.rounds)
        name = f"compiled step, vit_tiny/4 32 px bf16, batch {batch}"
        yield compare(name, times, compiled, eager, of="speed", goal=Goal(">=", bound))
        torch.compiler.reset()
