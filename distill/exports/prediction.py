"""An exported student at work: image in, classes out, without its recipe, its data or its teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.bar import Bar
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from distill.console import console
from distill.data.augment import to_float
from distill.data.images import ImageRules, Source, decode, to_square
from distill.errors import InputError
from distill.exports.folder import load_export
from distill.files.text import visible
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
    student, labels = load_export(folder)
    try:
        transform = Transform(student.adapter.contract, student.preparation)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    student.model.train(False)  # the student keeps its two heads apart; the model by itself has one answer
    return LoadedStudent(merge_heads(student.model).requires_grad_(False), transform, labels)


def most_probable(
    student: LoadedStudent, images: Sequence[str | PathLike[str] | Image.Image]
) -> list[list[tuple[str, float]]]:
    """The most probable classes of each image, and their probabilities, the most probable first.

    Raises:
        InputError: a file is no image, or the student's logits for it are not numbers.
    """
    if not student.labels:
        raise InputError(
            "predict: this student was trained without labels and has no classifier, only features. Train one from its "
            "weights (student.weights), or use the features themselves (distill.load_student)."
        )
    found = []
    for start in range(0, len(images), BATCH):
        inputs = torch.stack([_read(image, student.transform) for image in images[start : start + BATCH]])
        logits = student.model(inputs)
        for source, answered in zip(images[start : start + BATCH], are_numbers(logits.numpy()), strict=True):
            if not answered:
                raise InputError(f"{_name(source)}: the student's logits are not numbers, so it has no answer.")
        for probabilities in logits.softmax(-1):
            top = probabilities.topk(min(TOP, len(student.labels)))
            labels = [student.labels[label] for label in top.indices.tolist()]
            found.append(list(zip(labels, top.values.tolist(), strict=True)))
    return found


def _name(source: str | PathLike[str] | Image.Image) -> str:
    return "image" if isinstance(source, Image.Image) else str(source)


def _read(source: str | PathLike[str] | Image.Image, transform: Transform) -> Tensor:
    return transform(source) if isinstance(source, Image.Image) else transform.read(os.fspath(source), str(source))


def table(classes: Sequence[tuple[str, float]]) -> Table:
    """What `most_probable` says of one image, for a console."""
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    has_bars = console.encoding.startswith("utf")  # their characters
    for label, share in classes:
        bar = Bar(1.0, 0.0, share, width=30) if has_bars else Text("#" * round(30 * share))
        shown.add_row(f"{100 * share:6.2f} %", bar, Text(visible(label)))
    return shown
