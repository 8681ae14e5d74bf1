"""Whole training pipelines, data and augmentation included: over timm's own parts, over one fixed batch, and two
processes over one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.peer import Peer, PilImages
from distill.console import say
from distill.data import open_dataset
from distill.launching.processes import start_processes
from teachers.cifar_resnet import CifarResNet

DEPTH = 20
FIRST_STEPS = {"cpu": 3, "cuda": 64}
"""Of a round, before its time is taken: in these a loader's processes start and fill their queue and, on CUDA, where
steps are short, empty what they had filled while it was compiled, until it is their pace that counts.
"""
STEPS = {"cpu": 6, "cuda": 64}
"""Of a round that are timed."""


def measure(machine: Machine) -> Iterator[Row]:
    if machine.on_cuda:
        for patch_size, resolution, batch_size in ((4, 32, 1024), (16, 224, 256)):
            student = arms.Student("vit_tiny", patch_size, resolution, batch_size, "bf16")
            yield from _over_peer(machine, student, "eager", "compiled")
        return
    for precision in machine.precisions:
        for patch_size in (4, 8):
            yield from _over_peer(machine, arms.Student(patch_size=patch_size, precision=precision), "eager")
    yield from _over_peer(machine, arms.Student(patch_size=16, resolution=224, batch_size=16))
    where = "pipeline, vit_nano/4 32 px fp32, batch 128"
    if not machine.wants(where):
        return
    if torch.get_num_threads() < 2:
        say("two processes over one are left out: they need two cores.")
        return
    two, one = (Arm(name, lambda: None) for name in ("two processes of one thread", "one process of two threads"))
    measured: dict[str, list[float]] = {two.name: [], one.name: []}
    for _ in range(machine.repetitions):
        measured[two.name].append(seconds_an_image(processes=2, threads=1))
        measured[one.name].append(seconds_an_image(processes=1, threads=2))
    yield compare(where, measured, two, one, of="speed")


def _over_peer(machine: Machine, student: arms.Student, *forms: str) -> Iterator[Row]:
    """Images per second with DeiT's augmentation and a ResNet-20's decisions; 224 px come from JPEG files."""
    where = f"pipeline, {student}"
    if not machine.wants(where):
        return
    accelerator, teacher = arms.accelerator(student.precision), arms.build_teacher(DEPTH, machine.device)
    folder, files = machine.scratch / "images", student.resolution > 32
    if files:
        _write_images(folder, 16 * student.batch_size, student.resolution)
    data = {"augment": arms.DEIT} | ({"name": "folder", "root": str(folder), "stream": True} if files else {})
    recipe = student.recipe(data=data, **arms.distilling(DEPTH))
    dataset = open_dataset(recipe.data, seed=0, device=machine.device) if files else None
    trainer = arms.build_trainer(recipe, accelerator, teacher, dataset)
    arm = partial(_loop, machine.device, student.batch_size, arms.step_flops(trainer))
    endless = partial(arms.endless_batches, trainer)
    ours = arm("pipeline", trainer.train_step, endless)
    fixed = arm("one fixed batch", trainer.train_step, partial(repeat, next(endless())))
    others = [_peer_arm(machine, replace(student, compile=form == "compiled"), form, folder, arm) for form in forms]
    times = machine.interleave([ours, fixed, *others], times=1, warm_up=0)
    for other in [*others, fixed]:
        rate = machine.matrix_rate(student.precision)
        yield compare(where, times, ours, other, of="speed", matrix_rate=rate)


def _loop(
    device: torch.device,
    batch_size: int,
    flops: float,
    name: str,
    step: Callable[[Any], object],
    batches: Callable[[], Iterator[Any]],
) -> Arm:
    """Training steps on batches of their own, anew in every round."""
    steps: Iterator[object] = iter(())

    def take(count: int) -> None:
        for _ in range(count):
            next(steps)

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal steps
        steps = map(step, batches())
        take(FIRST_STEPS[device.type])
        yield
        steps = iter(())  # ends the loader's processes

    count = STEPS[device.type]
    return Arm(name, partial(take, count), count * batch_size, flops, around)


def _peer_arm(machine: Machine, student: arms.Student, form: str, folder: Path, arm: Callable[..., Arm]) -> Arm:
    """timm's loader and task, with the number of loader processes that is fastest on this machine."""
    device, cores = machine.device, torch.get_num_threads()
    # More than enough for a round, so that the loader does not start its processes anew within it.
    count = 2 * student.batch_size * (FIRST_STEPS[device.type] + STEPS[device.type])
    if student.resolution > 32:
        images = PilImages(list(islice(cycle(map(str, sorted(folder.glob("train/*/*.jpg")))), count)))
    else:
        images = PilImages(np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8))
    choices = []
    for workers in sorted({max(1, cores // 2), cores}):
        peer = Peer(student, CifarResNet(DEPTH), images, device, workers=workers)
        choices.append(arm(f"timm's loader ({workers} workers) and task, {form}", peer.step, peer.batches))
    tried = replace(machine, repetitions=1).interleave(choices, times=1, warm_up=0)
    return min(choices, key=lambda choice: tried[choice.name])


def _write_images(folder: Path, count: int, resolution: int) -> None:
    """JPEG files a little larger than the student's input, smooth as photographs are."""
    side = resolution * 8 // 7
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8))
        for split in ("train", "test") if number < arms.NUM_CLASSES else ("train",):
            path = folder / split / str(number % arms.NUM_CLASSES) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def seconds_an_image(processes: int, threads: int, steps: int = STEPS["cpu"]) -> float:
    """In training by a launch of CPU processes with so many threads each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", __name__, str(threads), str(steps)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # without it accelerate joins no CPU processes
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.splitlines()[-1])  # gloo writes there too


def _train(threads: int, steps: int) -> None:
    """One of these processes; the main one prints the figure."""
    torch.set_num_threads(threads)
    state, student = start_processes(), arms.Student()
    trainer = arms.build_trainer(student.recipe(), arms.accelerator(student.precision))
    taken = map(trainer.train_step, arms.endless_batches(trainer))
    next(taken)
    began = time.perf_counter()
    for _ in range(steps):
        next(taken)
    if state.is_main_process:
        print((time.perf_counter() - began) / steps / student.batch_size)


if __name__ == "__main__":
    _train(*map(int, sys.argv[1:]))
