"""Sections of a recipe on the augmentation of training images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.options import Probability, Section


class RandomResizedCrop(Section):
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = Field(
        [0.08, 1.0], description="Smallest and largest share of the image's area that a crop covers."
    )
    ratio: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        [3 / 4, 4 / 3], description="Smallest and largest width over height of a crop."
    )


class RandAugment(Section):
    num_ops: int = Field(2, ge=1, le=8, description="Operations per sample, drawn with replacement from 15.")
    magnitude: float = Field(9.0, ge=0.0, le=10.0, description="Mean strength of the operations, 0 to 10.")
    magnitude_std: float = Field(0.5, ge=0.0, description="Standard deviation of the strength, which stays in 0 to 10.")
    probability: Probability = Field(0.5, description="Probability that a drawn operation is applied.")


class ColorJitter(Section):
    brightness: float = Field(0.0, ge=0.0, description="Factors from max(0, 1 - x) to 1 + x; 0 is off.")
    contrast: float = Field(0.0, ge=0.0, description="Factors from max(0, 1 - x) to 1 + x; 0 is off.")
    saturation: float = Field(0.0, ge=0.0, description="Factors from max(0, 1 - x) to 1 + x; 0 is off.")
    hue: float = Field(
        0.0, ge=0.0, le=0.5, description="Hue shift from -x to x, in turns of the colour circle; 0 is off."
    )


class Augment(Section):
    """All draws are per sample, from (seed, epoch, sample index)."""

    crop_padding: int = Field(
        0, ge=0, le=10_000, description="Zero-pad each side by this many pixels, then crop the original size at random."
    )
    random_resized_crop: RandomResizedCrop | None = Field(
        None, description="Crop a box of random area and aspect ratio and resize it (Szegedy et al. 2015)."
    )
    hflip: bool = Field(False, description="Mirror left to right with probability 1/2.")
    rand_augment: RandAugment | None = Field(
        None,
        description="RandAugment (Cubuk et al. 2020); {} is timm's 'rand-m9-mstd0.5-inc1'. Moves fill with the data's "
        "mean colour.",
    )
    trivial_augment: bool = Field(
        False,
        description="TrivialAugment (Müller and Hutter 2021): one operation per sample, torchvision's wide ranges. "
        "Moves fill with the data's mean colour.",
    )
    color_jitter: ColorJitter | None = Field(
        None,
        description="torchvision's ColorJitter, after rand_augment or trivial_augment if both are given (timm omits "
        "it then, unless forced).",
    )
    random_erasing: Probability = Field(
        0.0, description="Probability of overwriting a random box with noise (Zhong et al. 2017; timm's 'pixel' mode)."
    )
    mixup: float = Field(0.0, ge=0.0, description="Beta parameter of mixup (Zhang et al. 2018); 0 is off.")
    cutmix: float = Field(0.0, ge=0.0, description="Beta parameter of CutMix (Yun et al. 2019); 0 is off.")
    mix_probability: Probability = Field(1.0, description="Fraction of sample pairs that are mixed.")
    mix_switch: Probability = Field(0.5, description="Fraction of mixed pairs that use CutMix if both are on.")
    mix_off_epoch: int = Field(
        0, ge=0, description="First epoch, counted from 0, without mixing; 0: mix in all epochs."
    )
