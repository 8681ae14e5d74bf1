"""How fast students answer: against their teacher, in batches and one by one, with areas against without, and with
their heads merged against apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from distill.bench import arms
from distill.bench.flops import cifar_resnet_forward, vit_forward
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Row, compare, interleave
from distill.features import mean_over_heads
from distill.students import build_student, merge_heads

DEPTH = 20


def measure(machine: Machine) -> Iterator[Row]:
    teacher = arms.build_teacher(DEPTH, machine.device)
    for model in machine.sizes:
        student = arms.Student(model)
        for batch in (128, 1):
            images = torch.rand(batch, 3, 32, 32, device=machine.device)
            plain = _student_arm("ordinary attention", machine, student, images)
            areas = _student_arm("areas of 2", machine, student, images, attention=arms.AREAS)
            merged = _student_arm("merged heads", machine, student, images, merged=True, attention=arms.AREAS)
            ours = Arm(f"ResNet-{DEPTH}", partial(teacher, images), batch, cifar_resnet_forward(DEPTH))
            repetitions, times = machine.repetitions, 1 if batch > 1 else 30
            measured = interleave(
                [plain, areas, merged, ours], machine.device, repetitions=repetitions, times=times, warm_up=2
            )
            where, rate = f"{model}/4 32 px fp32, batch {batch}", machine.matrix_rates["fp32"]
            yield compare(f"inference, {where}", measured, areas, plain, of="time", matrix_rate=rate)
            yield compare(f"inference, {where}", measured, areas, ours, of="speed", matrix_rate=rate)
            yield compare(f"inference, {where}", measured, merged, areas, of="speed")


def _student_arm(
    name: str, machine: Machine, student: arms.Student, images: torch.Tensor, *, merged: bool = False, **options: object
) -> Arm:
    recipe = student.recipe(student=options)
    mean, std = arms.STATISTICS
    model = build_student(
        recipe.student, resolution=32, num_classes=arms.NUM_CLASSES, channels=3, mean=mean, std=std, seed=0
    )
    model.to(memory_format=torch.channels_last).to(machine.device).eval()
    flops = vit_forward(recipe.student, resolution=32, num_classes=arms.NUM_CLASSES)

    together = merge_heads(model.model) if merged else None

    @torch.inference_mode()
    def answer() -> torch.Tensor:
        return mean_over_heads(model.logits(images)) if together is None else together(model.adapter(images))

    return Arm(name, answer, len(images), flops)
