"""Whether a student's features collapsed: they, or its teacher's answers, are the same for all images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]
ENTROPY, KL = "teacher_entropy", "kl"
"""How names end in metrics.jsonl, after METHOD/ or METHOD/region_."""
LEAST_SPREAD = 1e-4
"""Of the features (`student/spread`): below it all images have one feature."""
CONSTANT = 1e-3
"""Entropy of the teacher's answers in nats, at which each of them is one prototype."""
UNIFORM = 1e-3
"""Share of the largest entropy that is missing where the answers are all prototypes alike."""


def collapse(recipe: Record, events: Iterable[Record]) -> str | None:
    """What collapsed in a run, by the lines of its metrics.jsonl; None if nothing did.

    Features collapse if the newest evaluation found no spread. The teacher's answers collapse if their entropy was 0,
    or that of equal probabilities, in every line.
    """
    spreads: list[float] = []
    entropies: dict[str, list[float]] = defaultdict(list)
    for event in events:
        for key, value in event.items():
            if not isinstance(value, int | float) or math.isnan(value):  # of a method that has ended
                continue
            if key == "student/spread":
                spreads.append(value)
            elif key.endswith(ENTROPY):
                entropies[key].append(value)
    if spreads and spreads[-1] < LEAST_SPREAD:
        return (
            f"the features collapsed: all images have the same ones (spread {spreads[-1]:.2g}), so what is measured on "
            "them says nothing"
        )
    if any(max(values) <= CONSTANT for values in entropies.values()):
        return (
            "the training collapsed: the entropy of the teacher's answers was 0 throughout, so each image got the same "
            "answer"
        )
    largest = math.log(most) if (most := prototypes(recipe)) else math.inf
    if any(min(values) >= (1 - UNIFORM) * largest for values in entropies.values()):
        return (
            "the training collapsed: the entropy of the teacher's answers was that of equal probabilities, "
            f"{largest:.3f}, throughout, so they taught nothing"
        )
    return None


def prototypes(recipe: Record) -> int | None:
    """The number of prototypes that a recipe's method on the student's own average has, if there is one."""
    sizes = [method.get("prototypes") for method in recipe.get("distill") or ()]
    return next((size for size in sizes if isinstance(size, int) and size > 1), None)
