"""The training step alone, on one fixed batch: area attention and other kinds over ordinary, pyramids over ViTs,
compiled over eager, each distillation method over plain training, one that has ended, DINO with ten views over plain
training, optimizers, and how near the step comes to the machine's matrix rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from distill.bench import arms
from distill.bench.arms import Student, step_arm
from distill.bench.measure import Arm, Machine, Row, compare

DEPTH = 20
PYRAMIDS = ("focal_nano", "regionvit_nano", "lg_nano")
METHODS = (
    "hard", "soft", "dkd", "dist", "guide", "fitnet", "attention_transfer", "relational", "similarity", "contrast",
)  # fmt: skip


def measure(machine: Machine) -> Iterator[Row]:
    for precision in machine.step_precisions:
        for model in machine.sizes:
            student = Student(model, precision=precision, batch_size=machine.batch_of(model))
            yield from _area_over_plain(machine, student)
        if machine.on_cuda:
            yield from _area_over_plain(machine, Student("vit_small", 16, 224, 256, precision))
    model = machine.sizes[0]
    student = Student(model, precision=machine.step_precisions[-1], batch_size=machine.batch_of(model))
    yield from _kinds(machine, student)
    yield from _pyramids(machine, replace(student, model="vit_nano", patch_size=4))
    yield from _methods(machine, student)
    yield from _ended(machine, student)
    yield from _self_distillation(machine, student)
    yield from _optimizers(machine, student)
    yield from _growth(machine, student)
    if machine.on_cuda:
        yield from _compiled_over_eager(machine)


def _area_over_plain(machine: Machine, student: Student) -> Iterator[Row]:
    where, share = f"step, {student}", f"share of the matrix rate, {student}"
    if not machine.wants(where, share):
        return
    accelerator = arms.accelerator(student.precision)
    plain = step_arm("ordinary attention", student.recipe(), accelerator)
    areas = [step_arm(name, student.recipe(**arms.with_areas(name)), accelerator) for name in arms.AREAS]
    product, rate = machine.matrix_product(student.precision), machine.matrix_rate(student.precision)
    times = machine.interleave([plain, *areas, product])
    for arm in areas:
        yield compare(where, times, arm, plain, of="time", matrix_rate=rate)
    # Both arms in FLOP/s: the ratio of their speeds is the share of the rate, taken round by round.
    yield compare(share, _per_flop(times, plain, product), plain, product, of="speed")


def _kinds(machine: Machine, student: Student) -> Iterator[Row]:
    """Other attention in all blocks."""
    where = f"kinds of attention, step, {student}"
    if not machine.wants(where):
        return
    accelerator = arms.accelerator(student.precision)
    plain = step_arm("ordinary attention", student.recipe(), accelerator)
    others = [step_arm(name, student.recipe(**arms.of_kind(name)), accelerator) for name in arms.KINDS]
    times, rate = machine.interleave([plain, *others]), machine.matrix_rate(student.precision)
    for arm in others:
        yield compare(where, times, arm, plain, of="time", matrix_rate=rate)


def _pyramids(machine: Machine, student: Student) -> Iterator[Row]:
    """Time of a step over that of a ViT with about as many parameters, and time per multiply-add over vit_nano's."""
    where = f"pyramids, step, {student.resolution} px {student.precision}"
    by_work = f"pyramids, time per multiply-add, {student.resolution} px {student.precision}"
    if not machine.wants(where, by_work):
        return
    accelerator = arms.accelerator(student.precision)
    models = [
        student,
        replace(student, model="vit_micro"),
        *(replace(student, model=model, patch_size=2) for model in PYRAMIDS),
    ]
    nano, micro, *pyramids = (step_arm(f"{one.model}/{one.patch_size}", one.recipe(), accelerator) for one in models)
    times, rate = machine.interleave([nano, micro, *pyramids]), machine.matrix_rate(student.precision)
    per_flop = _per_flop(times, nano, *pyramids)
    for arm in pyramids:
        yield compare(where, times, arm, micro, of="time", matrix_rate=rate)
        yield compare(by_work, per_flop, arm, nano, of="time")


def _per_flop(times: Mapping[str, Sequence[float]], *of: Arm) -> dict[str, list[float]]:
    return {arm.name: [time / arm.flops for time in times[arm.name]] for arm in of}


def _methods(machine: Machine, student: Student) -> Iterator[Row]:
    """Each method alone over plain training, and locality guidance beside the teacher's decisions over these alone."""
    where = f"step, {student.model}/{student.patch_size} under ResNet-{DEPTH}, 32 px {student.precision}"
    if not machine.wants(where):
        return
    accelerator = arms.accelerator(student.precision)
    teacher = arms.build_teacher(DEPTH, machine.device)

    def arm(name: str, *methods: str) -> Arm:
        return step_arm(name, student.recipe(**arms.distilling(DEPTH, *methods)), accelerator, teacher)

    plain, guided = step_arm("plain training", student.recipe(), accelerator), arm("hard and guide", "hard", "guide")
    alone = [arm(method, method) for method in METHODS]
    times = machine.interleave([plain, *alone, guided])
    for distilled in [*alone, guided]:
        yield compare(where, times, distilled, plain, of="time")
    yield compare(where, times, guided, alone[0], of="time")


def _ended(machine: Machine, student: Student) -> Iterator[Row]:
    """A method whose weight is 0 for the rest of the run costs nothing."""
    where = f"step after guidance, {student}"
    if not machine.wants(where):
        return
    accelerator, teacher = arms.accelerator(student.precision), arms.build_teacher(DEPTH, machine.device)
    guided = arms.distilling(DEPTH, "hard", "guide")
    guided["distill"][1]["weight"] = {"start": 2.5, "end": 0.0, "until": 0.5}
    ended = step_arm("hard, and guide that has ended", student.recipe(**guided), accelerator, teacher, at=0.75)
    alone = step_arm("hard", student.recipe(**arms.distilling(DEPTH, "hard")), accelerator, teacher)
    yield compare(where, machine.interleave([ended, alone]), ended, alone, of="time")


def _self_distillation(machine: Machine, student: Student) -> Iterator[Row]:
    """Time of an image with all its views over that of one view with a label, and time per multiply-add likewise."""
    where = f"self-distillation, step, {student}"
    by_work = f"self-distillation, time per multiply-add, {student}"
    if not machine.wants(where, by_work):
        return
    accelerator = arms.accelerator(student.precision)
    plain = step_arm("plain training", student.recipe(student={"distillation_token": False}), accelerator)
    dino = step_arm("dino, 2 + 8 views", student.recipe(**arms.self_distilling()), accelerator)
    times = machine.interleave([plain, dino])
    yield compare(where, times, dino, plain, of="time", matrix_rate=machine.matrix_rate(student.precision))
    yield compare(by_work, _per_flop(times, plain, dino), dino, plain, of="time")


def _optimizers(machine: Machine, student: Student) -> Iterator[Row]:
    where = f"step by optimizer, {student}"
    if not machine.wants(where):
        return
    accelerator = arms.accelerator(student.precision)
    muon, adamw = (
        step_arm(name, student.recipe(optim={"name": name}, **arms.with_areas()), accelerator)
        for name in ("nmuon", "adamw")
    )
    yield compare(where, machine.interleave([muon, adamw]), muon, adamw, of="time")


def _growth(machine: Machine, student: Student) -> Iterator[Row]:
    """Images per second at other batch sizes and resolutions over those of one student."""
    accelerator = arms.accelerator(student.precision)
    quarter = replace(student, batch_size=student.batch_size // 4)
    fourfold = replace(student, batch_size=student.batch_size * 4)
    fewer, more = replace(student, patch_size=8), replace(quarter, resolution=64)
    for what, students in (("batch", (quarter, student, fourfold)), ("tokens", (fewer, student, more))):
        name = f"growth with {what}, {student.model} {student.precision}"
        if not machine.wants(name):
            continue
        smaller, middle, larger = (
            step_arm(f"{one.resolution} px, patch {one.patch_size}, batch {one.batch_size}", one.recipe(), accelerator)
            for one in students
        )
        times, rate = machine.interleave([smaller, middle, larger]), machine.matrix_rate(student.precision)
        for arm in (smaller, larger):
            yield compare(name, times, arm, middle, of="speed", matrix_rate=rate)


def _compiled_over_eager(machine: Machine) -> Iterator[Row]:
    for batch in (1024, 128):
        student = Student("vit_tiny", precision="bf16", batch_size=batch, compile=True)
        name = f"compiled step, {student}, batch {batch}"
        if not machine.wants(name):
            continue
        accelerator = arms.accelerator("bf16")
        compiled = step_arm("compiled", student.recipe(), accelerator)
        eager = step_arm("eager", replace(student, compile=False).recipe(), accelerator)
        times = machine.interleave([compiled, eager])
        yield compare(name, times, compiled, eager, of="speed")
        torch.compiler.reset()
