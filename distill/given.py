"""Data and teacher given as Python objects in place of the recipe's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distill.data.given import GivenData
from distill.errors import InputError
from distill.inputs import InputContract
from distill.recipe import FROM_PYTHON, Recipe


@dataclass(frozen=True)
class Given:
    """Validated objects; None: as in the recipe."""

    data: GivenData | None = None
    teacher: tuple[nn.Module, InputContract] | None = None

    def check_all_there(self, began_with: Recipe, directory: Path) -> None:
        """Raise InputError if the run at `directory` began with objects that are not given again."""
        missing = []
        if began_with.data.name == FROM_PYTHON and self.data is None:
            missing.append("data=...")
        if self.teacher is None and any(spec.model == FROM_PYTHON for spec in began_with.teachers):
            missing.append("teacher=(module, distill.Contract(...))")
        if missing:
            raise InputError(
                f"{directory}: this run began with Python objects, and needs the same ones to resume: "
                f"distill.train(..., {', '.join(missing)}). They are compared with those that it began with."
            )


def take(data: Any, teacher: Any, *, test_alone: bool = False) -> tuple[Given, list[str]]:
    """Validate a caller's `data`, with `test_alone` perhaps without training images, and `teacher`; returns them, and
    the overrides that name them in a recipe.

    Raises:
        InputError: they have none of the supported forms.
    """
    overrides = [] if data is None else [f"data.name={FROM_PYTHON}"]
    pair = None
    if teacher is not None:
        network, contract = teacher if isinstance(teacher, tuple) and len(teacher) == 2 else (None, None)
        if not isinstance(network, nn.Module) or not isinstance(contract, InputContract):
            raise InputError("teacher: give (module, distill.Contract(mean, std, size)).")
        pair = network, contract
        section = {
            "model": FROM_PYTHON,
            "recipe": None,
            "weights": None,
            "mean": [*map(float, contract.mean)],
            "std": [*map(float, contract.std)],
            "size": contract.size,
            "interpolation": contract.interpolation,
        }
        overrides += [f"teacher.{key}={json.dumps(value)}" for key, value in section.items()]
    return Given(None if data is None else GivenData.of(data, test_alone=test_alone), pair), overrides
