"""Students' options, as recipes give them."""

from __future__ import annotations

from typing import Any

from distill.options import StudentOptions
from distill.recipe import recipe_model

KINDS: dict[str, dict[str, Any]] = {
    "refiner": {"kind": "refiner", "blocks": [0, 1]},
    "refiner, shared": {"kind": "refiner", "blocks": "all", "share": True},
    "performer": {"kind": "performer", "blocks": [0, 1], "features": 8, "redraw": 3},
    "focal": {"kind": "focal", "blocks": [0, 1], "window": 3, "expand": 1, "focal_window": 1},
}
"""Further attention, small enough for grids of three patches a side and more."""


def of_kind(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """The architecture of ViT-Nano with this attention of `KINDS`, and its `attention` argument."""
    attention = KINDS[name] | options
    return f"{attention.pop('kind')}_vit_nano", attention


def student_options(**keys: Any) -> StudentOptions:
    """The `student` section of a recipe with these keys, validated."""
    section = {"student": keys}
    return recipe_model(section).model_validate(section).student
