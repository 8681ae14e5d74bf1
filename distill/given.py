"""What Python code hands over in place of what a recipe names: data, a teacher."""

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
    """Checked; None for what the recipe names itself."""

    data: GivenData | None = None
    teacher: tuple[nn.Module, InputContract] | None = None

    def check_all_there(self, began_with: Recipe, directory: Path) -> None:
        """Raise InputError if the run at `directory` began with something that is not handed over again."""
        missing = []
        if began_with.data.name == FROM_PYTHON and self.data is None:
            missing.append("data=...")
        if self.teacher is None and any(spec.model == FROM_PYTHON for spec in began_with.teachers):
            missing.append("teacher=(module, distill.Contract(...))")
        if missing:
            raise InputError(
                f"{directory}: this run began with what Python code handed over, and is resumed with the same: "
                f"distill.train(..., {', '.join(missing)}). What is given is compared with what it began with."
            )


def take(data: Any, teacher: Any) -> tuple[Given, list[str]]:
    """The `data` and `teacher` of a caller, and the overrides by which a recipe names them.

    Raises:
        InputError: they are of none of the forms that there are.
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
    return Given(None if data is None else GivenData.of(data), pair), overrides
