"""What the suites measure with: students, teachers and data of the pipeline itself, on synthetic images.

Weights and images are random: what a step costs does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from distill.bench.measure import Arm
from distill.data import Batch, Dataset, DatasetInfo
from distill.data.dataset import ResidentDataset, ResidentSplit
from distill.flops import count_flops
from distill.inputs import IMAGENET_MEAN, IMAGENET_STD, InputContract
from distill.launching.processes import build_accelerator
from distill.methods.base import Method
from distill.recipe import Recipe, from_mapping
from distill.trainer import Trainer
from teachers import Teacher
from teachers.cifar_resnet import CifarResNet

NUM_CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""CIFAR-10's."""
DEIT = {
    "random_resized_crop": {},
    "hflip": True,
    "rand_augment": {},
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}
"""DeiT's augmentation (Touvron et al. 2021, table 9)."""
AREAS: dict[str, int | list[int]] = {"areas of 2": 2, "areas of 4": 4, "areas of 2x2": [2, 2]}
"""`max_area` by the name of the arm."""

KINDS: dict[str, dict[str, Any]] = {
    "refiner": {"kind": "refiner"},
    "performer of 32 features": {"kind": "performer", "features": 32},
    "focal in windows of 2": {"kind": "focal", "window": 2, "expand": 1},
    "focal in windows of 4": {"kind": "focal", "window": 4, "expand": 2},
}
"""`student.attention`, in all blocks, by the name of the arm."""


@dataclass(frozen=True)
class Student:
    """The student of an arm and how it is trained."""

    model: str = "vit_nano"
    patch_size: int = 4
    resolution: int = 32
    batch_size: int = 128
    precision: str = "fp32"
    compile: bool | str = "auto"

    def __str__(self) -> str:
        return f"{self.model}/{self.patch_size} {self.resolution} px {self.precision}"

    def recipe(self, **sections: Any) -> Recipe:
        """A recipe with this student; `sections` add keys to its own or replace them."""
        train = {"batch_size": self.batch_size, "precision": self.precision, "compile": self.compile}
        augment = {"crop_padding": 4, "hflip": True}
        mapping: dict[str, Any] = {
            "data": {"validation": 0, "resolution": self.resolution, "augment": augment},
            "student": {"model": self.model, "patch_size": self.patch_size, "distillation_token": True},
            "optim": {"warmup_epochs": 0},
            "train": {"epochs": 1, **train},
        }
        for name, section in sections.items():
            mapping[name] = mapping[name] | section if name in mapping else section
        return from_mapping(mapping, source="bench")


def with_areas(name: str = "areas of 2") -> dict[str, Any]:
    """The section of a recipe whose student has these areas."""
    return {"student": {"attention": {"kind": "area", "blocks": [0, 1], "max_area": AREAS[name]}}}


def of_kind(name: str) -> dict[str, Any]:
    """The section of a recipe whose student has this attention in all blocks."""
    return {"student": {"attention": KINDS[name] | {"blocks": "all"}}}


def distilling(depth: int, *methods: str, cache: bool = False) -> dict[str, Any]:
    """The sections of a recipe that distil from a CIFAR ResNet by these methods, or by its decisions, as DeiT does."""
    entries = [{"method": method} | ({"weight": 0.5} if method == "hard" else {}) for method in methods or ("hard",)]
    return {"teacher": {"model": f"cifar_resnet{depth}", "cache": cache}, "label_weight": 0.5, "distill": entries}


def self_distilling() -> dict[str, Any]:
    """The sections of a recipe that learns by DINO, from two views of 32 px and eight of 16 px."""
    views = [{"kind": "global", "count": 2, "size": 32}, {"kind": "local", "count": 8, "size": 16}]
    return {
        "data": {"augment": {}, "views": views},
        "teacher": {"ema": {}},
        "student": {"distillation_token": False},
        "label_weight": 0.0,
        "distill": [{"method": "dino"}],
    }


def accelerator(precision: str) -> Accelerator:
    """One for all arms of a group; the next call ends its use."""
    release_memory()  # of the group before
    return build_accelerator(Student(precision=precision).recipe().train, Path())


def resident_data(recipe: Recipe, device: torch.device, images: int = 4096) -> Dataset:
    """Random images of the recipe's resolution, held on the device."""
    side = recipe.data.resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    split = ResidentSplit(pixels, torch.arange(images) % NUM_CLASSES, None)
    names = tuple(str(label) for label in range(NUM_CLASSES))
    sizes = {"train": images, "validation": 0, "test": images}
    info = DatasetInfo("synthetic", names, 3, MEAN, STD, digest="synthetic", sizes=sizes)
    return ResidentDataset(info, recipe.data, device, {"train": split, "test": split})


def build_teacher(depth: int, device: torch.device) -> Teacher:
    """A CIFAR ResNet with random weights."""
    contract = InputContract(IMAGENET_MEAN, IMAGENET_STD, 32)
    return Teacher(f"cifar_resnet{depth}", CifarResNet(depth), contract, NUM_CLASSES).to(device)


def build_trainer(
    recipe: Recipe, accelerator: Accelerator, teacher: Teacher | None = None, dataset: Dataset | None = None
) -> Trainer:
    """The trainer of `distill train`, ready for steps."""
    trainer = Trainer(recipe, accelerator, dataset or resident_data(recipe, accelerator.device), teacher)
    trainer.model.train()
    return trainer


def step_flops(trainer: Trainer) -> int:
    """FLOPs of one image in a training step: three forward passes of the student (forward, and gradients by inputs and
    by weights) on each of its views, and one of the teacher; with the heads of a moving average, likewise.
    """
    data = trainer.recipe.data
    image = torch.zeros(1, 3, data.resolution, data.resolution)
    teachers = 0 if trainer.teacher is None else count_flops(trainer.teacher, image)
    if trainer.average is None:
        return 3 * count_flops(trainer.student, image) + teachers
    by_side = {side: torch.zeros(1, 3, side, side) for side in data.view_sizes}
    of_view = [count_flops(trainer.student.model, by_side[side]) for side in data.view_sizes]
    widths = torch.zeros(1, trainer.student.embedding_width)
    heads = [pair[0] for method in trainer.task.methods.values() for pair in cast(Method, method).averaged()]
    of_head = sum(count_flops(head, widths) for head in heads)
    asked = data.global_views
    return teachers + sum(3 * (one + of_head) for one in of_view) + sum(of_view[:asked]) + asked * of_head


def step_arm(
    name: str, recipe: Recipe, accelerator: Accelerator, teacher: Teacher | None = None, *, at: float = 0.0
) -> Arm:
    """Training steps on one batch, `at` this progress of the run, from 0 to 1."""
    trainer = build_trainer(recipe, accelerator, teacher)
    trainer.progress.step = round(at * trainer.schedule_steps)
    return steps_of(name, trainer)


def steps_of(name: str, trainer: Trainer) -> Arm:
    """Training steps on one batch."""
    batch = next(endless_batches(trainer))
    return Arm(name, lambda: trainer.train_step(batch), trainer.recipe.train.batch_size, step_flops(trainer))


def endless_batches(trainer: Trainer) -> Iterator[list[Batch]]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        yield from trainer.dataset.training_batches(trainer.plan, epoch)
        epoch += 1
