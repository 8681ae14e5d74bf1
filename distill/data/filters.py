"""Linear filters of uint8 images, with weights of each sample's own: bicubic resized crop and Gaussian blur.

Columns and rows are filtered by matrices of whole numbers in units of 2**-WEIGHT_BITS. In float64 all sums of grey
levels are exact, so the results, rounded once, depend neither on the device nor on the other samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_BITS = 22
"""Two weights and a grey level have 52 bits."""


def bicubic_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, size: int) -> Tensor:
    """Each sample's box, resized with antialiasing: uint8 [B, C, H, W] -> [B, C, size, size]; boxes int64 [B] each.

    torchvision's resized_crop of a float image, rounded to levels. Of PIL images it differs more where the resize
    overshoots: Pillow rounds and clamps between columns and rows, in an order that depends on its version.
    """
    across = _resizing(left, width, size, images.shape[3])
    down = _resizing(top, height, size, images.shape[2])
    return _filtered(images, across, down)


def _resizing(start: Tensor, length: Tensor, size: int, pixels: int) -> Tensor:
    """float64 [B, size, pixels]: weights of the pixels in those of the resized interval from `start`, int64 [B]."""
    scale = length.double() / size
    reach = scale.clamp_min(1.0)[:, None, None]  # antialiasing: the kernel grows with the pixels of the result
    offsets = torch.arange(pixels, device=start.device) - start[:, None]
    centres = (torch.arange(size, device=start.device) + 0.5) * scale[:, None]
    weights = _cubic((offsets[:, None, :] + 0.5 - centres[:, :, None]) / reach)
    weights = weights * ((offsets >= 0) & (offsets < length[:, None]))[:, None, :]
    return (weights / weights.sum(2, keepdim=True) * 2**WEIGHT_BITS).round()


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as in torch's and Pillow's antialiased resize; 0 from 2 on."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def gaussian_blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """uint8 [B, C, H, W] -> the same, blurred by a standard deviation of float64 [B] pixels each.

    As torchvision's gaussian_blur with a kernel of 2 * radius + 1 pixels: reflected at the borders, radius < H, W.
    """
    return _filtered(images, *(_blurring(sigma, radius, side) for side in (images.shape[3], images.shape[2])))


def _blurring(sigma: Tensor, radius: int, pixels: int) -> Tensor:
    """float64 [B, pixels, pixels]: weights of the pixels (last) in each blurred pixel."""
    steps = torch.arange(2 * pixels, device=sigma.device)
    kernel = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2) * (steps <= radius)
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - 1)  # both sides; the middle has 1
    kernel = (kernel * 2**WEIGHT_BITS).round()
    to, of = torch.meshgrid(steps[:pixels], steps[:pixels], indexing="ij")
    # A pixel's reflections are beyond the first and beyond the last one; these two themselves have none.
    first, last = kernel[:, to + of], kernel[:, (2 * (pixels - 1) - to - of)]
    return kernel[:, (to - of).abs()] + first * (of > 0) + last * (of < pixels - 1)


def _filtered(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """uint8 [B, C, H, W], weights of columns [B, w, W] and rows [B, h, H] -> uint8 [B, C, h, w]."""
    batch, channels, height, _ = images.shape
    # One product a sample, not one a channel.
    columns = (images.double().flatten(1, 2) @ across.mT).view(batch, channels, height, -1)
    sums = (down @ columns.transpose(1, 2).flatten(2)).unflatten(2, (channels, -1)).transpose(1, 2)
    return sums.mul_(2.0 ** (-2 * WEIGHT_BITS)).add_(0.5).floor_().clamp_(0.0, 255.0).to(torch.uint8)
