"""`data.fit`: how images of any shape become squares, in training, evaluation and use alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data import BatchPlan, Dataset, open_dataset
from distill.data.images import ImageRules, to_square
from distill.data.stream import Draw, crop_box
from distill.errors import InputError
from distill.exports.prediction import Transform
from distill.inputs import InputContract, Preparation
from distill.recipe import Data
from distill.recipe.augment import RandomResizedCrop

CPU = torch.device("cpu")


def opened(root: Path, fit: str, stream: bool = False, **spec: Any) -> Dataset:
    values = {"name": "folder", "root": str(root), "resolution": 10, "validation": 0.0, "workers": 0} | spec
    return open_dataset(Data(fit=fit, stream=stream, **values), seed=0, device=CPU)


def files(root: Path) -> list[Path]:
    return sorted((root / "test").rglob("*.png"))


def reference(image: Image.Image, fit: str, background: tuple[int, int, int]) -> Tensor:
    """uint8 [3, 10, 10]."""
    if fit == "squash":
        return torch.from_numpy(np.array(image.resize((10, 10), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    side = max(image.size)
    square = np.full((10, 10, 3), background, dtype=np.uint8)
    (left, right), (top, bottom) = (
        (int(((side - own) // 2) * 10 / side + 0.5), int(((side - own) // 2 + own) * 10 / side + 0.5))
        for own in image.size
    )
    square[top:bottom, left:right] = np.array(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    return torch.from_numpy(square).permute(2, 0, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_evaluation_training_and_use_see_the_same_squares(make_folder: Any, fit: str, stream: bool) -> None:
    root = make_folder(test=4)
    dataset = opened(root, fit, stream, background=[0, 100, 200])
    expected = torch.stack([reference(Image.open(path), fit, (0, 100, 200)) for path in files(root)])
    ((images, _),) = dataset.evaluation_batches("test", 0, 12, 12)
    assert torch.equal((images * 255).round().to(torch.uint8), expected)
    preparation = Preparation.of(images[0], 10, (0, 100, 200), fit)
    transform = Transform(InputContract((0.0,) * 3, (1.0,) * 3, 10), Preparation.from_json(preparation._asdict()))
    assert torch.equal(torch.stack([transform(Image.open(path)) for path in files(root)]), images)
    assert dataset.info.digest != opened(root, "crop", stream).info.digest
    if stream:  # a crop of all is all
        everything = {"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}
        dataset = opened(root, fit, True, background=[0, 100, 200], augment=everything)
        (batch,) = next(dataset.training_batches(BatchPlan(0, 36), epoch=0))
        whole = torch.cat([images for images, _ in dataset.evaluation_batches("train", 0, 36, 36)])
        assert torch.equal(batch.images, whole[batch.indices])


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_random_crops_are_cut_of_the_squares(fit: str) -> None:
    """Of slopes, whose mean in a box is their value in its middle."""
    x, y = np.meshgrid(np.arange(80), np.arange(40))
    image = Image.fromarray(np.stack([x * 3, y * 3, np.full_like(x, 77)], -1).astype(np.uint8))
    rules = ImageRules(fit=fit, background=(1, 2, 3))
    crop = RandomResizedCrop(scale=[0.05, 0.5])
    for index in range(30):
        top, left, height, width = box = crop_box(image, index, Draw(0, 0), crop, fit) or (0, 0, 0, 0)
        assert 0 <= left <= 80 - width
        assert 0 <= top <= 80 - height
        square = to_square(image, 20, box, rules).double()
        if fit == "squash":
            middle = [3 * (left + width / 2 - 0.5), 3 * ((top + height / 2) / 2 - 0.5)]
            assert square.mean((1, 2))[:2].tolist() == pytest.approx(middle, abs=1.5)
            continue
        rows = torch.arange(20) * height / 20 + top + height / 40  # of the frame, where the image has rows 20 to 60
        inside = (rows > 20 + height / 20) & (rows < 60 - height / 20)
        outside = (rows < 20 - height / 20) | (rows > 60 + height / 20)
        assert (square[2][inside] == 77).all()
        assert (square[:, outside] == torch.tensor([1, 2, 3])[:, None, None]).all()
        assert square[1][inside].mean(1).tolist() == pytest.approx(
            (3 * (rows[inside] - 20.5)).tolist(), abs=0.5 + 3 * height / 20
        )


def test_thin_images_and_grey_ones() -> None:
    thin = Image.new("L", (900, 1), 50)
    square = to_square(thin, 9, None, ImageRules(fit="pad"))
    assert square.shape == (1, 9, 9)
    assert square[0, :, 0].tolist() == [255] * 4 + [50] + [255] * 4
    pixels = (np.arange(300) % 256).astype(np.uint8).reshape(10, 10, 3)
    for fit in ("crop", "squash", "pad"):
        square = to_square(Image.fromarray(pixels), 10, None, ImageRules(fit=fit))
        assert torch.equal(square.permute(1, 2, 0), torch.from_numpy(pixels))


def test_images_of_one_size_are_not_fitted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.fit: the images of 'digits' have one size"):
        opened(tmp_path, "pad", name="digits")
