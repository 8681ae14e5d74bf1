"""`data.views`: groups of crops of each training image (multi-crop: Caron et al. 2020, arXiv 2006.09882). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.options import Key, Positive, Probability, Problem, Side
from distill.recipe.augment import Augment, ColorJitter, RandomResizedCrop

LOCAL = {"size": 16, "scale": [0.05, 0.4], "blur": 0.5}
"""Defaults of local views, where they differ."""


class View(RandomResizedCrop):
    """A group of views with the same augmentation, drawn for each view by itself. The defaults are those of DINO's
    first view and of its local ones (Caron et al. 2021, arXiv 2104.14294).
    """

    kind: Literal["global", "local"] = Field(
        "global", description="global: seen by the student and by its moving average; local: by the student alone."
    )
    count: int = Field(1, ge=1, le=100, description="Number of such views.")
    size: Side = Field(32, description="Side in pixels; of the first view it is data.resolution; of local views 16.")
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = Field(
        [0.4, 1.0],
        description="Smallest and largest share of the image's area that a crop covers; of local views [0.05, 0.4].",
    )
    hflip: bool = Field(True, description="Mirror left to right with probability 1/2.")
    color_jitter: ColorJitter | None = Field(
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        description="torchvision's ColorJitter, in random order; null: none.",
    )
    jitter_probability: Probability = Field(0.8, description="Probability of the colour jitter.")
    grey: Probability = Field(0.2, description="Probability of taking the colours away.")
    blur: Probability = Field(1.0, description="Probability of a Gaussian blur; of local views 0.5.")
    blur_sigma: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        [0.1, 2.0], description="Smallest and largest standard deviation of the blur, in pixels of the view."
    )
    solarize: Probability = Field(
        0.0, description="Probability of inverting values of at least 128; DINO's second view has 0.2, and blur 0.1."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        return {**LOCAL, **values} if isinstance(values, dict) and values.get("kind") == "local" else values


def check(data: Any) -> Iterator[Problem]:
    """What of `data.views` does not fit together, or the rest of the section."""
    at: Key = ("data", "views")
    kinds = [group.kind for group in data.views]
    if kinds[0] != "global" or ("local", "global") in pairwise(kinds):
        yield Problem((at,), f"at least one global group, and all before the local ones; got {', '.join(kinds)}")
    elif data.views[0].size != data.resolution:
        yield Problem(
            ((*at, 0, "size"), ("data", "resolution")),
            f"the first view has data.resolution {data.resolution}, got {data.views[0].size}",
        )
    for index, group in enumerate(data.views):
        if index and group.size > data.resolution:
            yield Problem(
                ((*at, index, "size"), ("data", "resolution")),
                f"at most data.resolution {data.resolution}, got {group.size}",
            )
        for key in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(group, key)
            if not 0 < low <= high:
                yield Problem(((*at, index, key),), f"smallest, then largest, both above 0; got [{low}, {high}]")
    if data.augment != Augment():
        yield Problem((("data", "augment"), at), "each group of data.views has its own augmentation; leave this out")
    if data.growth is not None:
        yield Problem((("data", "growth"), at), "data.views has sizes of its own; set one of the two to null")
