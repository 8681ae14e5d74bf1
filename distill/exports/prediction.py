"""An exported student at work: image in, classes out, without its recipe, its data or its teacher."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill.data.augment import to_float
from distill.data.images import ImageRules, Source, decode, to_square
from distill.errors import InputError
from distill.exports.folder import load_export
from distill.inputs import InputAdapter, InputContract, Preparation
from distill.report.metrics import are_numbers
from distill.students import merge_heads

TOP = 5
BATCH = 64


class LoadedStudent(NamedTuple):
    model: nn.Module
    """What `transform` gives, in batches [B, C, size, size] -> logits [B, classes]: the mean of the two heads where
    there are two, merged into one layer; features [B, D] of a student without a classifier. In eval mode, on the CPU,
    without gradients.
    """
    transform: Transform
    labels: list[str]
    """Names of the classes, in the order of the logits; empty without a classifier."""


class Transform:
    """An image of Pillow's, of any size -> float32 [C, size, size], ready for the model: what evaluation does to a test
    image of that size, normalisation and all.

    Raises:
        InputError: the image is damaged, too large, so long that it is no picture, or of more than 8 bits per channel.
    """

    def __init__(self, contract: InputContract, preparation: Preparation) -> None:
        if preparation.channels not in (1, 3):
            raise InputError(f"this student takes images of {preparation.channels} channels; no image file has these.")
        assert contract.size is not None, "a student has one input size"
        self.size = contract.size
        self.preparation = preparation
        self.rules = ImageRules(preparation.channels, preparation.background, fit=preparation.fit)
        self.adapter = InputAdapter(contract)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.read(image, "image")

    def read(self, source: Source, name: str) -> Tensor:
        """As for an image of Pillow's, also from a file; messages begin with `name`."""
        image = decode(source, name, self.rules, remedy="")
        pixels = to_square(image, self.size, None, self.rules) if self.preparation.by_pillow else self._as_it_is(image)
        return self.adapter(to_float(pixels[None]))[0]

    def _as_it_is(self, image: Image.Image) -> Tensor:
        """uint8 [C, H, W]; the adapter resizes it."""
        if self.preparation.square and image.width != image.height:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)


def load_student(folder: str | Path) -> LoadedStudent:
    """The student in a folder that `distill export` or a run wrote.

    Raises:
        InputError: a file is missing, damaged or was changed.
    """
    with torch.random.fork_rng(devices=[]):  # random weights are drawn before they are loaded
        student, labels = load_export(folder)
    try:
        transform = Transform(student.adapter.contract, student.preparation)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    student.model.train(False)  # the student keeps its two heads apart; the model by itself has one answer
    return LoadedStudent(merge_heads(student.model).requires_grad_(False), transform, labels)


class Answer(NamedTuple):
    """What a student says of one image."""

    image: str
    """Its path, or 'image'."""
    classes: list[tuple[str, float]]
    """The most probable ones and their probabilities, the most probable first; empty if there is a problem."""
    problem: str | None = None
    """Why there is no answer, with the path."""


def answers(
    student: LoadedStudent, images: Iterable[str | PathLike[str] | Image.Image], *, top: int = TOP, batch: int = BATCH
) -> Iterator[Answer]:
    """Answers in the order of the images, `batch` of them at a time; an image without one is no error.

    Raises:
        InputError: the student has no classifier.
    """
    if not student.labels:
        raise InputError(
            "predict: this student was trained without labels and has no classifier, only features. Train one from its "
            "weights (student.weights), or use the features themselves (distill.load_student)."
        )
    remaining = iter(images)
    while sources := list(islice(remaining, batch)):
        read = [_read_or_problem(source, student.transform) for source in sources]
        inputs = [found for found in read if isinstance(found, Tensor)]
        logits = student.model(torch.stack(inputs)) if inputs else torch.empty(0, len(student.labels))
        rows = zip(logits.softmax(-1), are_numbers(logits.numpy()), strict=True)
        for source, found in zip(sources, read, strict=True):
            if not isinstance(found, Tensor):
                yield Answer(_name(source), [], found)
                continue
            probabilities, answered = next(rows)
            if not answered:
                problem = f"{_name(source)}: the student's logits are not numbers, so it has no answer."
                yield Answer(_name(source), [], problem)
                continue
            best = probabilities.topk(min(top, len(student.labels)))
            labels = [student.labels[label] for label in best.indices.tolist()]
            yield Answer(_name(source), list(zip(labels, best.values.tolist(), strict=True)))


def most_probable(
    student: LoadedStudent, images: Sequence[str | PathLike[str] | Image.Image], top: int = TOP
) -> list[list[tuple[str, float]]]:
    """The most probable classes of each image, and their probabilities, the most probable first.

    Raises:
        InputError: a file is no image, the student's logits for it are not numbers, or it has no classifier.
    """
    found = []
    for answer in answers(student, images, top=top):
        if answer.problem is not None:
            raise InputError(answer.problem)
        found.append(answer.classes)
    return found


def _read_or_problem(source: str | PathLike[str] | Image.Image, transform: Transform) -> Tensor | str:
    try:
        return _read(source, transform)
    except InputError as error:
        return str(error)


def _name(source: str | PathLike[str] | Image.Image) -> str:
    return "image" if isinstance(source, Image.Image) else str(source)


def _read(source: str | PathLike[str] | Image.Image, transform: Transform) -> Tensor:
    return transform(source) if isinstance(source, Image.Image) else transform.read(os.fspath(source), str(source))
