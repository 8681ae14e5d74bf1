"""What builds a student: each family is one module with a `Builder` and the options of its recipe section."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from distill.options import StudentOptions

Statistics = tuple[Sequence[float], Sequence[float]]


class Images(NamedTuple):
    """What a student is built for."""

    resolution: int
    """Side in pixels that its inputs are resized to."""
    num_classes: int
    channels: int
    mean: tuple[float, ...]
    """Of the training data, in [0, 1], as `std`."""
    std: tuple[float, ...]


class Built(NamedTuple):
    """A model, and what `timm.create_model` makes the same model of."""

    model: nn.Module
    architecture: str
    model_args: dict[str, Any]
    statistics: Statistics
    """Mean and std that its inputs are normalised by."""


class Builder(ABC):
    """Builds the models of one family, on the CPU; torch's generator is seeded before."""

    @staticmethod
    @abstractmethod
    def build(options: Any, images: Images) -> Built:
        """The model that these options ask for, with random weights, or timm's where they say `pretrained`.

        Raises:
            InputError: there is no such model, or it cannot take such images.
        """


def inputs_of(options: StudentOptions, images: Images) -> tuple[int, Statistics | None]:
    """Channels that the model takes, and their statistics; None: those that the pretrained weights come with.

    Pretrained weights see colour: a greyscale image is repeated for them. Any other number of channels is the data's
    affair.
    """
    if options.pretrained and images.channels in (1, 3):
        return 3, None
    return images.channels, (images.mean, images.std)
