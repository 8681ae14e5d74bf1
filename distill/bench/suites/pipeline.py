"""Whole training pipelines, data and augmentation included: over timm's own parts, over one fixed batch, and two
processes over one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from distill.bench import arms
from distill.bench.flops import TRAINING, cifar_resnet_forward, vit_forward
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Goal, Row, Unmeasured, compare, interleave, seconds
from distill.bench.peer import Peer, PilImages
from distill.bench.processes import Group
from distill.data import Batch, open_dataset
from distill.trainer import Trainer
from teachers.cifar_resnet import CifarResNet

DEPTH = 20
SECONDS_A_ROUND = 1.6
FILES = 256


def measure(machine: Machine) -> Iterator[Row | Unmeasured]:
    if machine.device.type == "cuda":
        student = arms.Student("vit_tiny", precision="bf16", batch_size=1024)
        yield from _over_peer(machine, student, {"eager": Goal(">=", 5), "compiled": Goal(">=", 3)}, Goal(">=", 0.98))
        student = arms.Student("vit_tiny", 16, 224, 256, "bf16")
        yield from _over_peer(machine, student, {"eager": Goal(">=", 3), "compiled": Goal(">=", 3)}, None)
        yield Unmeasured("two CPU processes of one thread over one of two", ">= 0.9", "a goal for CPUs")
        return
    for precision in machine.precisions:
        student = arms.Student(precision=precision)
        yield from _over_peer(machine, student, {"eager": Goal(">=", 1.05)}, Goal(">=", 0.95))
        yield from _over_peer(machine, replace(student, patch_size=8), {"eager": Goal(">=", 1.2)}, None)
    yield from _over_peer(machine, arms.Student(patch_size=16, resolution=224, batch_size=16), {}, None)
    yield Unmeasured("pipeline over timm's, tiny, 32 px", ">= 5 (eager peer), >= 3 (compiled)", "needs CUDA, 16 cores")
    yield Unmeasured("pipeline over timm's, tiny, 224 px", ">= 3", "needs CUDA and 16 cores")
    yield from _processes(machine)


def _over_peer(machine: Machine, student: arms.Student, peers: Mapping[str, Goal], fixed: Goal | None) -> Iterator[Row]:
    """Images per second with DeiT's augmentation and a ResNet-20's decisions; 224 px come from JPEG files."""
    accelerator = arms.accelerator(student.precision)
    recipe = student.recipe(augment=arms.DEIT, **arms.distilling(f"cifar_resnet{DEPTH}"))
    dataset = None
    if student.resolution > 32:
        _write_folder(machine, student.resolution)
        data = recipe.data.model_copy(
            update={"name": "folder", "root": str(machine.scratch / "images"), "stream": True}
        )
        dataset = open_dataset(data, seed=0, device=machine.device, num_processes=1, process_index=0)
    teacher = arms.build_teacher(DEPTH, machine.device)
    trainer = arms.build_trainer(recipe, accelerator, teacher=teacher, dataset=dataset)
    flops = cifar_resnet_forward(DEPTH) + TRAINING * vit_forward(
        recipe.student, resolution=student.resolution, num_classes=arms.NUM_CLASSES
    )
    batch = arms.fixed_batch(trainer)
    for _ in range(machine.rounds["warm_up"]):
        trainer.train_step(batch)
    step = seconds(lambda: trainer.train_step(batch), machine.device, machine.rounds["times"])
    first_steps = _first_steps(machine)
    steps = max(4, first_steps, round(SECONDS_A_ROUND / step))
    whole = Whole(trainer, first_steps, steps)
    arm = partial(Arm, units=steps * student.batch_size, flops=flops)
    ours = arm("pipeline", whole.run, before=whole.start, after=whole.stop)
    still = arm("one fixed batch", partial(_repeat, steps, lambda: trainer.train_step(batch)))
    others = [_peer_arm(machine, student, form, arm, first_steps, steps) for form in peers]
    times = interleave([ours, still, *others], machine.device, repetitions=machine.repetitions, warm_up=0)
    where = f"pipeline, {student.model}/{student.patch_size} {student.resolution} px {student.precision}"
    rate = machine.matrix_rates[student.precision]
    for other, goal in zip(others, peers.values(), strict=True):
        yield compare(where, times, ours, other, of="speed", goal=goal, matrix_rate=rate)
    row = compare(where, times, ours, still, of="speed", goal=fixed, matrix_rate=rate)
    yield replace(row, details={**(row.details or {}), "waiting_for_data": whole.waited / whole.took})
    accelerator.free_memory()


def _first_steps(machine: Machine) -> int:
    """Before the time is taken: in these a loader's processes start and fill their queue and, on CUDA, where steps are
    short, empty what they had filled while it was compiled, until it is their pace that counts.
    """
    return 3 if machine.device.type == "cpu" else min(4 * machine.cores, 64)


def _repeat(times: int, step: Callable[[], None]) -> None:
    for _ in range(times):
        step()


class Whole:
    """The pipeline's own steps, with what they waited for data."""

    def __init__(self, trainer: Trainer, first_steps: int, steps: int) -> None:
        self.trainer, self.first_steps, self.steps = trainer, first_steps, steps
        self.waited = self.took = 0.0
        self.batches: Iterator[list[Batch]] = iter(())

    def start(self) -> None:
        self.batches = arms.endless_batches(self.trainer)
        for _ in range(self.first_steps):
            self.trainer.train_step(next(self.batches))

    def run(self) -> None:
        began = time.perf_counter()
        for _ in range(self.steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - asked
            self.trainer.train_step(batch)
        self.took += time.perf_counter() - began

    def stop(self) -> None:
        self.batches = iter(())  # ends the loader's processes


def _peer_arm(
    machine: Machine, student: arms.Student, form: str, arm: partial[Arm], first_steps: int, steps: int
) -> Arm:
    """timm's loader and task, with the number of loader processes that is fastest on this machine."""
    # Enough for a round, so that the loader does not start its processes anew within it.
    images = _images(machine, student, max(4096, (first_steps + steps) * student.batch_size))

    def build(workers: int) -> Peer:
        compiled = replace(student, compile=form == "compiled")
        return Peer(compiled, CifarResNet(DEPTH), images, machine.device, workers=workers)

    def first_round(workers: int) -> float:
        peer = build(workers)
        peer.start(first_steps)
        taken = seconds(peer.step, machine.device, max(4, steps // 3))
        peer.stop()
        return taken

    choices = sorted({1, machine.cores // 2, machine.cores} - {0})
    workers = min(choices, key=first_round)
    peer = build(workers)
    return arm(
        f"timm's loader ({workers} workers) and task, {form}",
        partial(_repeat, steps, peer.step),
        before=lambda: peer.start(first_steps),
        after=peer.stop,
    )


def _images(machine: Machine, student: arms.Student, count: int) -> PilImages:
    labels = np.zeros(count, dtype=np.int64)
    if student.resolution > 32:
        files = sorted(str(path) for path in (machine.scratch / "images" / "train").rglob("*.jpg"))
        return PilImages([files[index % len(files)] for index in range(count)], labels)
    generator = np.random.default_rng(0)
    return PilImages(generator.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), labels)


def _write_folder(machine: Machine, resolution: int) -> None:
    """JPEG files a little larger than the student's input, smooth as photographs are."""
    root = machine.scratch / "images"
    if root.exists():
        return
    side = resolution * 8 // 7
    generator = np.random.default_rng(0)
    for split, count in (("train", FILES if machine.device.type == "cpu" else 16 * FILES), ("test", 10)):
        for number in range(count):
            folder = root / split / str(number % arms.NUM_CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def _processes(machine: Machine) -> Iterator[Row | Unmeasured]:
    """Two gloo processes of one thread each and one process of two threads, on the same global batch."""
    name, goal = "two processes of one thread over one of two threads", Goal(">=", 0.9)
    if machine.cores < 2:
        yield Unmeasured(name, str(goal), "needs two cores")
        return
    with Group(processes=2, threads=1) as two, Group(processes=1, threads=2) as one:
        a = Arm("two processes of one thread", two.steps, two.images)
        b = Arm("one process of two threads", one.steps, one.images)
        times = interleave([a, b], machine.device, repetitions=machine.repetitions)
    yield compare("pipeline, vit_nano/4 32 px fp32, batch 128", times, a, b, of="speed", goal=goal)
