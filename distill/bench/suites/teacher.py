"""What a teacher costs: distilling over not distilling, with and without the cache, and its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from functools import partial

import torch

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.flops import count_flops
from teachers.cifar_resnet import CifarResNet

DEPTH = 56


def measure(machine: Machine) -> Iterator[Row]:
    for precision in machine.step_precisions:
        model = machine.sizes[-1]
        student = arms.Student(model, precision=precision, batch_size=machine.batch_of(model))
        yield from _distilling(machine, student)
    yield from _own_path(machine)


def _distilling(machine: Machine, student: arms.Student) -> Iterator[Row]:
    where = f"step, {student.model}/{student.patch_size} under ResNet-{DEPTH}, 32 px {student.precision}"
    if not machine.wants(where):
        return
    accelerator = arms.accelerator(student.precision)
    teacher = arms.build_teacher(DEPTH, machine.device)
    plain = arms.step_arm("not distilling", student.recipe(), accelerator)
    distilled = arms.step_arm("distilling", student.recipe(**arms.distilling(DEPTH)), accelerator, teacher)
    replaying = arms.build_trainer(student.recipe(**arms.distilling(DEPTH, cache=True)), accelerator, teacher)
    batch = next(arms.endless_batches(replaying))
    with chdir(machine.scratch):
        replaying.open_cache()
        assert replaying.cache is not None
        replaying.cache.start()
        replaying.train_step(batch)  # records the teacher's answers
        replaying.cache.flush()
    cached = plain._replace(name="distilling, teacher cached", run=partial(replaying.train_step, batch))
    times = machine.interleave([distilled, cached, plain])
    for arm in (distilled, cached):
        yield compare(where, times, arm, plain, of="time", matrix_rate=machine.matrix_rate(student.precision))


def _own_path(machine: Machine) -> Iterator[Row]:
    """The forward pass as a run feeds it against the network as it is published."""
    name = f"teacher's forward pass, ResNet-{DEPTH} 32 px fp32"
    if not machine.wants(name):
        return
    network = CifarResNet(DEPTH).eval().to(machine.device)
    teacher = arms.build_teacher(DEPTH, machine.device)
    images = torch.rand(128, 3, 32, 32, device=machine.device)
    published = torch.no_grad()(lambda: network(teacher.adapter(images)))
    ours = Arm("folded, channels last", partial(teacher, images), len(images), count_flops(teacher, images[:1]))
    other = ours._replace(name="as published", run=published)
    times = machine.interleave([ours, other])
    yield compare(name, times, ours, other, of="speed", matrix_rate=machine.matrix_rate("fp32"))
