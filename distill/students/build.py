"""Builds the student of a recipe's `student` section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch

from distill import registry
from distill.errors import InputError
from distill.inputs import InputContract
from distill.options import Key, StudentOptions, dotted
from distill.students.builder import Built, Images
from distill.students.saved import read_export
from distill.students.student import Student
from distill.students.weights import load_saved_weights


def build_student(
    spec: StudentOptions,
    *,
    resolution: int,
    num_classes: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    other_sides: Mapping[int, Key] = MappingProxyType({}),
) -> Student:
    """A student on the CPU, with weights that depend on `seed` only; torch's random state is restored.

    Args:
        spec: the recipe's `student` section.
        num_classes: 0: without a head.
        resolution: side in pixels that its inputs are resized to.
        channels, mean, std: of the training data, in [0, 1]. Weights from timm or an export have their own mean, std.
        other_sides: sides in pixels of other images that it has to take too, and the recipe's key of each.

    Raises:
        InputError: no such model, it cannot take such images, or its weights are missing, do not fit or cannot be
            downloaded.
    """
    images = Images(resolution, num_classes, channels, tuple(mean), tuple(std), tuple(other_sides))
    saved = read_export(spec.weights) if spec.weights else None
    with _seeded(seed):
        built: Built = registry.find("students", spec.family).implementation.build(spec, images)
    mean, std = built.statistics
    if saved is not None:
        load_saved_weights(built.model, saved, str(spec.weights))
        mean, std = saved.config["pretrained_cfg"]["mean"], saved.config["pretrained_cfg"]["std"]
    contract = InputContract(tuple(mean), tuple(std), resolution)
    student = Student(built.model, contract, architecture=built.architecture, model_args=built.model_args)
    _check_forward(student, images, other_sides)
    return student


def _check_forward(student: Student, images: Images, other_sides: Mapping[int, Key]) -> None:
    """Raise InputError if the model cannot take its inputs: some of timm's models require certain sizes."""
    blank = torch.zeros(1, images.channels, images.resolution, images.resolution)
    student.eval()
    for side, key in {images.resolution: ("student", "model"), **other_sides}.items():
        try:
            with torch.no_grad():
                student(blank, side=side, embed=not student.heads)
        except (RuntimeError, AssertionError, ValueError) as error:
            other = "model or data.resolution" if side == images.resolution else f"{key[-1]} or student.model"
            raise InputError(
                f"{dotted(key)}: {student.architecture} cannot take images of {side} px ({error}). "
                f"Choose another {other}."
            ) from error
    if not student.heads:
        student.check_embedding()
    student.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed and restore only the CPU's generator: models are built on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
