"""How fast students answer: against their teacher, in batches and one by one, with areas against without, and with
their heads merged against apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.features import mean_over_heads
from distill.flops import count_flops
from distill.students import Student, merge_heads

DEPTH = 20


def measure(machine: Machine) -> Iterator[Row]:
    teacher = arms.build_teacher(DEPTH, machine.device)
    accelerator = arms.accelerator("fp32")
    for model in machine.sizes:
        student = arms.Student(model)
        ordinary, areas, merged = (
            arms.build_trainer(student.recipe(**sections), accelerator).student.eval()
            for sections in ({}, arms.with_areas(), arms.with_areas())
        )
        networks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
            "ordinary attention": (ordinary, partial(_answer, ordinary)),
            "areas of 2": (areas, partial(_answer, areas)),
            "merged heads": (areas, nn.Sequential(merged.adapter, merge_heads(merged.model))),
            f"ResNet-{DEPTH}": (teacher, teacher),
        }
        for batch in (128, 1):
            where = f"inference, {student}, batch {batch}"
            if not machine.wants(where):
                continue
            images = torch.rand(batch, 3, 32, 32, device=machine.device)
            plain, area, together, cnn = (
                Arm(name, partial(torch.inference_mode()(answer), images), batch, count_flops(network, images[:1]))
                for name, (network, answer) in networks.items()
            )
            times = machine.interleave([plain, area, together, cnn], times=30 if batch == 1 else None)
            rate = machine.matrix_rate("fp32")
            yield compare(where, times, area, plain, of="time", matrix_rate=rate)
            yield compare(where, times, area, cnn, of="speed", matrix_rate=rate)
            yield compare(where, times, together, area, of="speed")


def _answer(student: Student, images: Tensor) -> Tensor:
    return mean_over_heads(student.logits(images))
