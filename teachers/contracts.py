"""Input contracts of teachers: what a library's configuration says, and the recipe where it says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill import recipe
from distill.errors import InputError
from distill.inputs import InputContract

TORCH_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def timm_contract(config: Mapping[str, Any]) -> InputContract:
    interpolation = interpolation_of(config.get("interpolation"))
    return InputContract(tuple(config["mean"]), tuple(config["std"]), config["input_size"][-1], interpolation)


def interpolation_of(name: str | None) -> str:
    """torch has no Lanczos or `random`; bicubic is closest to both."""
    return name if name in TORCH_INTERPOLATIONS else "bicubic"


def contract_of(spec: recipe.Teacher, default: InputContract) -> InputContract:
    contract = InputContract(
        mean=default.mean if spec.mean is None else tuple(spec.mean),
        std=default.std if spec.std is None else tuple(spec.std),
        size=spec.size or default.size,
        interpolation=spec.interpolation or default.interpolation,
    )
    if len(contract.mean) != len(contract.std):
        raise InputError(
            f"teacher.mean, teacher.std: {len(contract.mean)} and {len(contract.std)} channels; give equally many."
        )
    return contract
