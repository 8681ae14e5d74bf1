"""Corruptions against their definitions in numpy, scipy and PIL, image by image."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from distill.analysis.corruptions import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    CORRUPTIONS,
    JPEG_QUALITY,
    NOISE,
    PIXELATE,
    SEVERITIES,
    corrupt,
)


def images(side: int = 32, channels: int = 3, count: int = 3) -> Tensor:
    """Smooth enough to look like something, with black, white and grey in it."""
    generator = torch.Generator().manual_seed(side + channels)
    small = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)
    smooth[0, :, :3, :3], smooth[0, :, 3:6, :3], smooth[0, :, 6:9, :3] = 0.0, 1.0, 0.5
    return (smooth * 255).round().to(torch.uint8)


@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
@pytest.mark.parametrize("side", [32, 64])
def test_they_are_what_they_say(severity: int, side: int) -> None:
    given, level = images(side), severity - 1

    def expected(image: Tensor, name: str) -> np.ndarray:
        pixels = image.permute(1, 2, 0).numpy()
        fractions = pixels / 255.0
        if name == "gaussian blur":
            sigma = BLUR[level] * side / 32
            out = np.stack(
                [gaussian_filter(fractions[..., c], sigma, mode="nearest", truncate=4.0) for c in range(3)], -1
            )
        elif name == "contrast":
            mean = fractions.mean((0, 1), keepdims=True)
            out = (fractions - mean) * CONTRAST[level] + mean
        elif name == "brightness":
            out = np.empty_like(fractions)
            for row, column in np.ndindex(side, side):
                hue, saturation, value = colorsys.rgb_to_hsv(*fractions[row, column])
                out[row, column] = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + BRIGHTNESS[level]))
        elif name == "JPEG":
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY[level])
            return np.asarray(Image.open(file))
        else:
            small = int(side * PIXELATE[level])
            shrunk = Image.fromarray(pixels).resize((small, small), Image.Resampling.BOX)
            return np.asarray(shrunk.resize((side, side), Image.Resampling.BOX))
        return np.uint8(np.clip(out, 0, 1) * 255 + 1e-6)

    for name in CORRUPTIONS:
        if name == "gaussian noise":
            continue
        got = corrupt(name, severity, given, torch.arange(3))
        assert got.dtype == torch.uint8
        for image, result in zip(given, got, strict=True):
            difference = np.abs(expected(image, name).astype(int) - result.permute(1, 2, 0).numpy().astype(int))
            # Cutting off decimals, a float32 may fall on the other side of a whole number than a float64.
            assert difference.max() <= (0 if name in ("JPEG", "pixelate") else 1)
            assert (difference > 0).mean() < 0.03


@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
def test_noise_is_normal_and_belongs_to_the_image(severity: int) -> None:
    grey = torch.full((16, 3, 32, 32), 128, dtype=torch.uint8)
    indices = torch.arange(16) + 100
    noisy = corrupt("gaussian noise", severity, grey, indices)
    values = (noisy.double() + 0.5 - 128) / 255
    # 49,152 draws; the deviation of a value that is cut to whole numbers grows by a twelfth of a step squared.
    assert abs(values.mean().item()) < 4 * NOISE[severity - 1] / len(values.flatten()) ** 0.5
    assert values.std().item() == pytest.approx((NOISE[severity - 1] ** 2 + 1 / 12 / 255**2) ** 0.5, rel=0.02)
    flat = values.flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.1
    assert torch.corrcoef(flat.view(-1, 3, 1024).transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.05
    part = corrupt("gaussian noise", severity, grey[3:7], indices[3:7])
    assert torch.equal(part, noisy[3:7])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [8, 28])
def test_every_kind_of_image_goes_through_and_changes(channels: int, side: int) -> None:
    given = images(side, channels)
    for name in CORRUPTIONS:
        got = corrupt(name, SEVERITIES, given, torch.arange(3))
        assert got.shape == given.shape
        assert got.dtype == torch.uint8
        assert not torch.equal(got, given), name
        assert torch.equal(got, corrupt(name, SEVERITIES, given, torch.arange(3)))
        if channels == 4 and name in ("JPEG", "pixelate", "gaussian blur", "contrast"):
            assert torch.equal(got[:, :1], corrupt(name, SEVERITIES, given[:, :1], torch.arange(3)))


def test_more_severe_is_further_away() -> None:
    given = images()
    for name in CORRUPTIONS:
        distances = [
            (corrupt(name, severity, given, torch.arange(3)).float() - given.float()).square().mean().item()
            for severity in range(1, SEVERITIES + 1)
        ]
        if name != "pixelate":  # boxes of 24 pixels lie better over 32 than those of 27
            assert distances == sorted(distances), name
