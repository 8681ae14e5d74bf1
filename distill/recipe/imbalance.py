"""Unbalanced classes: what they are, and checks of `data.class_weights`, `data.sampler`, `train.select`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distill import registry
from distill.options import Problem
from distill.recipe.schema import Data
from distill.recipe.variants import reader_of

UNBALANCED = 1.5
"""Ratio of the largest class to the smallest one from which on logs and reports speak of it."""


def is_unbalanced(class_images: Sequence[int]) -> bool:
    """Whether the largest class is so much larger than the smallest one, of those that have images."""
    counts = [count for count in class_images if count]
    return bool(counts) and max(counts) >= UNBALANCED * min(counts)


def check(recipe: Any) -> Iterator[Problem]:
    """What does not fit together, whatever the data."""
    data = recipe.data
    reader = reader_of(data.name)
    options = None if reader is None else registry.options_of("datasets")[reader]
    if options is not None and issubclass(options, Data) and options.in_order:
        for key in ("class_weights", "sampler", "long_tail"):
            if getattr(data, key) is not None:
                yield Problem(
                    (("data", key),),
                    f"'{data.name}' is read in its reader's order, and its classes are not counted before; set it to "
                    "null, or use images with random access, such as a folder or hfds/",
                )
    if data.class_weights == "balanced" and data.sampler == "balanced":
        yield Problem(
            (("data", "class_weights"), ("data", "sampler")),
            "the sampler draws each class equally often already; set one of the two to null",
        )
    if data.class_weights is not None and recipe.label_free:
        yield Problem(
            (("data", "class_weights"), ("label_weight",), ("distill",)),
            "neither labels nor methods on logits have a part in the loss, so nothing is weighted; set it to null",
        )
    if recipe.train.select == "macro":
        if recipe.label_free:
            yield Problem(
                (("train", "select"), ("label_weight",), ("distill",)),
                "a run without labels is selected by its nearest neighbours; leave it out",
            )
        elif not data.validation and data.select_on == "validation":
            yield Problem(
                (("train", "select"), ("data", "validation")),
                "without a validation split nothing is selected; give data.validation, or leave it out",
            )
