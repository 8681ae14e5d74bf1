"""The shipped recipes that train teachers are plain training of a network that can serve as a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import teachers.cifar_resnet  # noqa: F401  registers the names with timm
from distill import recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "teachers").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_teacher_recipes(path: Path) -> None:
    loaded = recipe.load(path)
    assert loaded.teachers == []
    assert loaded.distill == []
    assert loaded.label_weight == 1.0
    network = timm.create_model(loaded.student.model, num_classes=10).eval()
    side = loaded.data.resolution
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 10)
    comment = path.read_text(encoding="utf-8").partition("\ndata:")[0]
    assert f"accelerate launch distill/train.py recipes/teachers/{path.name}" in comment


def test_they_are_found() -> None:
    assert {"cifar10_resnet18_finetune", "cifar10_resnet20_scratch", "digits_cnn"} <= {path.stem for path in RECIPES}
