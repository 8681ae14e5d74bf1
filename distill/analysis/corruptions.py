"""Corruptions of test images at five severities: six of CIFAR-10-C's recipes.

Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv
1903.12261. The parameters are those of CIFAR-10-C, made for 32 pixels. On larger images the blur's width, which is in
pixels, grows with the shorter side over 32; all others are per pixel, or relative, and stay as they are. As there, the
results are whole numbers of 0 to 255, cut off and not rounded. Noise is a function of the image's index in the test
set: whoever corrupts it, on whatever device, gets the same.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distill.data.randomness import hashes, keys, look_up, normal_table

SEVERITIES = 5
ORIGINAL_SIDE = 32
NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
JPEG_QUALITY = (80, 65, 58, 50, 40)
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)


def corrupt(name: str, severity: int, images: Tensor, indices: Tensor) -> Tensor:
    """One of `CORRUPTIONS` at a severity of 1 to 5.

    Args:
        images: uint8 [B, C, H, W].
        indices: int64 [B], on the same device, which images of the test set they are.

    Returns:
        uint8 [B, C, H, W] on that device.
    """
    return CORRUPTIONS[name](images, severity - 1, indices)


def gaussian_noise(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """Normal noise, independent for every pixel and channel."""
    values = images[0].numel()
    # Two-step hashing: a key for every image, then one draw for each of its values.
    seeds = hashes(keys(0, level, ["corruption/noise"], images.device), indices)[0]
    drawn = hashes(torch.stack([seeds, seeds ^ 0x5BD1E995], 1), torch.arange(values, device=images.device))
    noise = look_up(normal_table().to(images.device), drawn).view(images.shape)
    return _whole(_fractions(images) + NOISE[level] * noise)


def gaussian_blur(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """A Gaussian cut off at four deviations; edge pixels are repeated beyond the edge."""
    sigma = BLUR[level] * max(1.0, min(images.shape[-2:]) / ORIGINAL_SIDE)
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    blurred = _fractions(images).flatten(0, 1)[:, None]
    for _ in range(2):  # rows, then, transposed, columns
        blurred = F.conv2d(F.pad(blurred, (radius, radius, 0, 0), mode="replicate"), kernel).transpose(2, 3)
    return _whole(blurred.view(images.shape))


def brightness(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """More value (of hue, saturation and value): the largest channel grows, the others in proportion."""
    pixels = _fractions(images)
    value = pixels.amax(1, keepdim=True)
    brighter = (value + BRIGHTNESS[level]).clamp_max(1.0)
    return _whole(torch.where(value > 0, pixels * (brighter / value.clamp_min(1e-12)), brighter))


def contrast(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """Closer to the mean colour of the image."""
    pixels = _fractions(images)
    mean = pixels.mean((2, 3), keepdim=True)
    return _whole((pixels - mean) * CONTRAST[level] + mean)


def jpeg(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """Compressed by PIL, colours at half the resolution."""

    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG_QUALITY[level])
        return Image.open(file)

    return _by_image(images, compress)


def pixelate(images: Tensor, level: int, indices: Tensor) -> Tensor:
    """Shrunk and enlarged again by averaging over boxes."""

    def shrink(image: Image.Image) -> Image.Image:
        size = (max(1, int(image.width * PIXELATE[level])), max(1, int(image.height * PIXELATE[level])))
        return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _by_image(images, shrink)


CORRUPTIONS: Mapping[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "gaussian noise": gaussian_noise,
    "gaussian blur": gaussian_blur,
    "brightness": brightness,
    "contrast": contrast,
    "JPEG": jpeg,
    "pixelate": pixelate,
}


def _fractions(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255


def _whole(pixels: Tensor) -> Tensor:
    # What is a whole number stays one: a float32 may lie just below it.
    return (pixels.clamp(0.0, 1.0) * 255 + 1e-3).floor().to(torch.uint8)


def _by_image(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Every image, or every channel where there are neither one nor three, through PIL."""
    planes = images.cpu() if images.shape[1] in (1, 3) else images.cpu().flatten(0, 1)[:, None]

    def through_pil(plane: Tensor) -> Tensor:
        pixels = plane.permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        changed = torch.from_numpy(np.array(change(image), dtype=np.uint8))
        return changed.view(*pixels.shape).permute(2, 0, 1)

    with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
        changed = list(pool.map(through_pil, planes, chunksize=max(1, math.ceil(len(planes) / 32))))
    return torch.stack(changed).view(images.shape).to(images.device)
