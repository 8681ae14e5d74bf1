"""Shared fixtures. Tests that need the project's shared folder (real CIFAR-10, public teachers) skip where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("DISTILL_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _shared(part: str) -> Path:
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"shared folder absent: {part} is neither beside the checkout nor under $DISTILL_SHARED")
    return path


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """The folder with the real CIFAR-10 as cifar10.safetensors."""
    return _shared("data/cifar10")


@pytest.fixture(scope="session")
def teacher_weights() -> Path:
    """The folder with the public CIFAR ResNet weights."""
    return _shared("weights")
