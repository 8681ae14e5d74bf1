"""Students' options, as recipes give them."""

from __future__ import annotations

from typing import Any

from distill.options import StudentOptions
from distill.recipe import recipe_model


def student_options(**keys: Any) -> StudentOptions:
    """The `student` section of a recipe with these keys, validated."""
    section = {"student": keys}
    return recipe_model(section).model_validate(section).student
