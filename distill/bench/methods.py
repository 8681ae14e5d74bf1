"""What each distillation method adds to a step, under ResNet-20."""

from __future__ import annotations

from collections.abc import Iterator

from distill.bench import arms
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave

DEPTH = 20
METHODS = ("hard", "soft", "dkd", "dist", "guide", "fitnet", "attention_transfer", "relational", "similarity")


def measure_methods(machine: Machine) -> Iterator[Row | Unmeasured]:
    """Each alone over plain training, and locality guidance beside the teacher's decisions over these alone."""
    cuda = machine.device.type == "cuda"
    student = arms.Student(machine.sizes[0], precision="bf16", batch_size=1024 if cuda else 128)
    accelerator = arms.accelerator(student.precision)
    teacher = arms.build_teacher(DEPTH, machine.device)
    name = f"cifar_resnet{DEPTH}"

    def arm(what: str, *methods: str) -> Arm:
        sections = [arms.HARD if method == "hard" else {"method": method} for method in methods]
        recipe = student.recipe(**(arms.distilling(name, *sections) if sections else {}))
        trainer = arms.build_trainer(recipe, accelerator, teacher=teacher if sections else None)
        batch = arms.fixed_batch(trainer)
        return Arm(what, lambda: trainer.train_step(batch), student.batch_size)

    plain, guided = arm("plain training"), arm("hard and guide", "hard", "guide")
    alone = [arm(method, method) for method in METHODS]
    times = interleave([plain, *alone, guided], machine.device, **machine.rounds)
    where = f"step, {student.model}/{student.patch_size} under ResNet-{DEPTH}, 32 px {student.precision}"
    for distilled in [*alone, guided]:
        yield compare(where, times, distilled, plain, of="time")
    goal = Goal("<=", 1.15)
    if cuda:
        yield Unmeasured("guide over hard distillation", str(goal), "the goal is for a CPU")
    yield compare(where, times, guided, alone[0], of="time", goal=None if cuda else goal)
    accelerator.free_memory()
