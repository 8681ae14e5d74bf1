"""The public weights score what they are published with, to the image, on the real CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from teachers import ZOO, load_teacher


@pytest.fixture(scope="module")
def test_set(cifar10_root: Path) -> tuple[Tensor, Tensor]:
    tensors = load_file(cifar10_root / "cifar10.safetensors")
    return tensors["test.images"], tensors["test.labels"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("model", "file", "top1", "images", "correct"),
    [
        ("cifar_resnet20", "resnet20-12fca82f.th", 91.73, 10_000, 9173),
        ("cifar_resnet56", "resnet56-4bfd9763.th", 93.39, 2_000, 1859),  # of all, 9,339: a minute of one core
    ],
)
def test_public_weights(
    model: str,
    file: str,
    top1: float,
    images: int,
    correct: int,
    test_set: tuple[Tensor, Tensor],
    teacher_weights: Path,
) -> None:
    assert ZOO[model].accuracy.top1 == pytest.approx(top1)
    assert ZOO[model].url.endswith(f"/{file}")
    teacher = load_teacher({"model": model, "weights": str(teacher_weights / file)}, 10)
    parts = test_set[0][:images].split(500)
    answers = torch.cat([teacher(part.float() / 255).argmax(1) for part in parts])
    assert int((answers == test_set[1][:images]).sum()) == correct


@pytest.mark.shared
def test_fed_other_statistics_it_is_visibly_worse(test_set: tuple[Tensor, Tensor], teacher_weights: Path) -> None:
    """What the contract protects from: CIFAR's own statistics instead of the ImageNet ones it was trained with."""
    spec = {"model": "cifar_resnet20", "weights": str(teacher_weights / "resnet20-12fca82f.th")}
    images, labels = test_set[0][:1000].float() / 255, test_set[1][:1000]
    right = (load_teacher(spec, 10)(images).argmax(1) == labels).float().mean()
    identity = load_teacher(spec | {"mean": [0.0] * 3, "std": [1.0] * 3}, 10)
    assert torch.isfinite(identity(images)).all()
    assert (identity(images).argmax(1) == labels).float().mean() < right - 0.05
