"""Small image folders made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIZES = [(20, 14), (16, 16), (13, 30), (40, 17)]

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    def make(mode: str = "RGB", train: int = 12, **splits: int) -> Path:
        """`train` images a class in each of three classes, and those of further splits, PNG so that pixels survive."""
        rng = np.random.default_rng(0)
        root = tmp_path / "set"
        for split, count in ({"train": train} | (splits or {"test": 3})).items():
            for name in ("cat", "ant", "bee"):
                folder = root / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    width, height = SIZES[number % len(SIZES)]
                    shape = (height, width) if mode == "L" else (height, width, 3)
                    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:03}.png")
        return root

    return make


@pytest.fixture(scope="session")
def photos() -> Callable[..., Tensor]:
    """Images with the smooth areas, edges and noise of photographs, uint8 [count, channels, height, width]."""

    def make(count: int, channels: int = 3, height: int = 24, width: int = 32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, channels, height // 6 + 1, width // 6 + 1)
        coarse = torch.rand(shape, generator=generator) * 260 - 30
        smooth = functional.interpolate(coarse, size=(height, width), mode="bicubic")
        blocks = functional.interpolate(coarse.flip(0), size=(height, width), mode="nearest")
        noise = torch.randn((count, channels, height, width), generator=generator)
        return (smooth + blocks / 4 + 4 * noise).clamp(0, 255).to(torch.uint8)

    return make
