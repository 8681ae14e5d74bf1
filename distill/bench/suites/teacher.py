"""What a teacher costs: distilling over not distilling, with and without the cache, and its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import torch

from distill.bench import arms
from distill.bench.flops import TRAINING, cifar_resnet_forward, vit_forward
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave
from distill.data import Batch
from distill.trainer import Trainer
from teachers.cifar_resnet import CifarResNet

DEPTH = 56


def measure(machine: Machine) -> Iterator[Row | Unmeasured]:
    cuda = machine.device.type == "cuda"
    for precision in ("bf16",) if cuda else machine.precisions:
        student = arms.Student(machine.sizes[-1], precision=precision, batch_size=1024 if cuda else 64)
        yield from _distilling(machine, student)
    if not cuda:
        yield Unmeasured("distilling over not distilling", "<= 1.12", "the goal is for CUDA")
    yield _own_path(machine)


def _distilling(machine: Machine, student: arms.Student) -> Iterator[Row]:
    accelerator = arms.accelerator(student.precision)
    teacher = arms.build_teacher(DEPTH, machine.device)
    alone = arms.build_trainer(student.recipe(), accelerator)
    name = f"cifar_resnet{DEPTH}"
    taught = arms.build_trainer(student.recipe(**arms.distilling(name)), accelerator, teacher=teacher)
    replaying = arms.build_trainer(student.recipe(**arms.distilling(name, cache=True)), accelerator, teacher=teacher)
    flops = TRAINING * vit_forward(alone.recipe.student, resolution=student.resolution, num_classes=arms.NUM_CLASSES)
    batch = arms.fixed_batch(alone)
    plain = Arm("not distilling", lambda: alone.train_step(batch), student.batch_size, flops)
    distilled = Arm(
        "distilling", lambda: taught.train_step(batch), student.batch_size, flops + cifar_resnet_forward(DEPTH)
    )
    cached = Arm("distilling, teacher cached", lambda: replaying.train_step(batch), student.batch_size, flops)
    _record(replaying, batch, machine.scratch)
    times = interleave([distilled, cached, plain], machine.device, **machine.rounds)
    where = f"{student.model}/{student.patch_size} under ResNet-{DEPTH}, 32 px {student.precision}"
    cuda = machine.device.type == "cuda"
    rate = machine.matrix_rates[student.precision]
    goal = Goal("<=", 1.12) if cuda else None
    yield compare(f"step, {where}", times, distilled, plain, of="time", goal=goal, matrix_rate=rate)
    yield compare(f"step, {where}", times, cached, plain, of="time", goal=Goal("<=", 1.02), matrix_rate=rate)


def _record(trainer: Trainer, batch: list[Batch], folder: Path) -> None:
    """Give the trainer a cache in `folder` that has the batch already."""
    with chdir(folder):
        trainer.open_cache()
        assert trainer.cache is not None
        trainer.cache.start()
        trainer.train_step(batch)
        trainer.cache.flush()


def _own_path(machine: Machine) -> Row:
    """The forward pass as a run feeds it against the network as it is published."""
    torch.manual_seed(0)
    network = CifarResNet(DEPTH).eval().to(machine.device)
    teacher = arms.build_teacher(DEPTH, machine.device)
    images = torch.rand(128, 3, 32, 32, device=machine.device)

    @torch.no_grad()
    def published() -> None:
        network(teacher.adapter(images))

    ours = Arm("folded, channels last", lambda: teacher(images), len(images), cifar_resnet_forward(DEPTH))
    other = Arm("as published", published, len(images), cifar_resnet_forward(DEPTH))
    times = interleave([ours, other], machine.device, repetitions=machine.repetitions, times=3)
    name = f"teacher's forward pass, ResNet-{DEPTH} 32 px fp32"
    return compare(name, times, ours, other, of="speed", matrix_rate=machine.matrix_rates["fp32"])
