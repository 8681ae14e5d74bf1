"""Base class of student builders: each family is one module with a `Builder` and its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from distill.options import StudentOptions

Statistics = tuple[Sequence[float], Sequence[float]]


class Images(NamedTuple):
    """Properties of the student's inputs and classes."""

    resolution: int
    """Side in pixels that its inputs are resized to."""
    num_classes: int
    """0: a model without a head, which answers with its features, and without a distillation token."""
    channels: int
    mean: tuple[float, ...]
    """Of the training data, in [0, 1], as `std`."""
    std: tuple[float, ...]
    other_sides: tuple[int, ...] = ()
    """Of other images that it has to take too (`data.growth`, `data.views`)."""

    def dynamic_size(self) -> dict[str, bool]:
        """The argument of timm's vision transformers that take images of several sizes, if there are any. Not for
        `Built.model_args`: exports have one size.
        """
        return {"dynamic_img_size": True} if self.other_sides else {}


class Built(NamedTuple):
    """A model, and the arguments of `timm.create_model` for the same model."""

    model: nn.Module
    architecture: str
    model_args: dict[str, Any]
    statistics: Statistics
    """Mean and std of its input normalisation."""


class Builder(ABC):
    """Builds the models of one family, on the CPU; torch's generator is seeded by the caller."""

    @staticmethod
    @abstractmethod
    def build(options: Any, images: Images) -> Built:
        """The model of these options, with random weights, or timm's if `pretrained`.

        Raises:
            InputError: no such model, or it cannot take such images.
        """


def inputs_of(options: StudentOptions, images: Images) -> tuple[int, Statistics | None]:
    """Input channels of the model, and their mean and std; None: those of the pretrained weights.

    Pretrained weights take three channels: greyscale images are repeated for them.
    """
    if options.pretrained and images.channels in (1, 3):
        return 3, None
    return images.channels, (images.mean, images.std)
