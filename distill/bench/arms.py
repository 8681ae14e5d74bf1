"""What the suites measure with: students, teachers and data of the pipeline itself, on synthetic images.

Weights and images are random: what a step costs does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distill.data import Batch, Dataset, DatasetInfo
from distill.data.dataset import ResidentDataset, ResidentSplit
from distill.inputs import IMAGENET_MEAN, IMAGENET_STD, InputContract
from distill.launching.processes import build_accelerator
from distill.recipe import Recipe, from_mapping
from distill.trainer import Trainer
from teachers import Teacher
from teachers.cifar_resnet import CifarResNet

NUM_CLASSES = 10
STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""CIFAR-10's means and deviations."""
AREAS = {"kind": "area", "max_area": 2, "blocks": [0, 1]}
CROP_AND_FLIP = {"crop_padding": 4, "hflip": True}
DEIT = {
    "random_resized_crop": {},
    "hflip": True,
    "rand_augment": {},
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}
"""DeiT's augmentation (Touvron et al. 2021, table 9)."""

HARD = {"method": "hard", "weight": 0.5}


@dataclass(frozen=True)
class Student:
    """The student of an arm and how it is trained."""

    model: str = "vit_nano"
    patch_size: int = 4
    resolution: int = 32
    batch_size: int = 128
    precision: str = "fp32"
    compile: bool | str = "auto"

    def recipe(self, *, augment: Mapping[str, Any] = CROP_AND_FLIP, **sections: Any) -> Recipe:
        """A recipe with this student; `sections` add to it or replace."""
        mapping: dict[str, Any] = {
            "name": "bench",
            "data": {"validation": 0, "resolution": self.resolution, "augment": dict(augment)},
            "student": {"model": self.model, "patch_size": self.patch_size, "distillation_token": True},
            "train": {
                "epochs": 1,
                "batch_size": self.batch_size,
                "precision": self.precision,
                "compile": self.compile,
            },
        }
        for name, section in sections.items():
            mapping[name] = {**mapping.get(name, {}), **section} if isinstance(section, dict) else section
        return from_mapping(mapping, source="bench")


def accelerator(precision: str) -> Accelerator:
    """One for all arms of a precision; the next call ends its use."""
    return build_accelerator(Student(precision=precision).recipe().train, Path())


def resident_data(recipe: Recipe, device: torch.device, images: int = 4096) -> Dataset:
    """Random images of the recipe's resolution, held on the device."""
    side = recipe.data.resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(NUM_CLASSES, (images,), generator=generator)
    split = ResidentSplit(pixels, labels, None)
    names = tuple(str(label) for label in range(NUM_CLASSES))
    sizes = {"train": images, "validation": 0, "test": images}
    info = DatasetInfo("synthetic", names, 3, *STATISTICS, digest="synthetic", sizes=sizes)
    return ResidentDataset(info, recipe.data, device, {"train": split, "test": split})


def build_teacher(depth: int, device: torch.device) -> Teacher:
    """A CIFAR ResNet with random weights."""
    torch.manual_seed(0)
    contract = InputContract(IMAGENET_MEAN, IMAGENET_STD, 32)
    return Teacher(f"cifar_resnet{depth}", CifarResNet(depth), contract, NUM_CLASSES).to(device)


def build_trainer(
    recipe: Recipe, accelerator: Accelerator, *, teacher: Teacher | None = None, dataset: Dataset | None = None
) -> Trainer:
    """The trainer of `distill train`, ready for steps."""
    data = dataset if dataset is not None else resident_data(recipe, accelerator.device)
    trainer = Trainer(recipe, accelerator, data, teacher)
    trainer.model.train()
    return trainer


def endless_batches(trainer: Trainer) -> Iterator[list[Batch]]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        yield from trainer.dataset.training_batches(trainer.plan, epoch)
        epoch += 1


def fixed_batch(trainer: Trainer) -> list[Batch]:
    """The first batch, on the device."""
    return next(trainer.dataset.training_batches(trainer.plan, 0))


def distilling(teacher: str, *methods: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The sections of a recipe that distil from `teacher` by these methods, or by its decisions, as DeiT does."""
    return {
        "teacher": {"model": teacher, **options},
        "label_weight": 0.5,
        "distill": [dict(method) for method in methods] or [HARD],
    }
