"""Colour operations on uint8 images, with a different operation for each sample of a batch.

Pointwise operations are look-up tables of 256 entries per channel; saturation and sharpness are blends. Results equal
PIL's (ImageOps, ImageEnhance) byte for byte, except autocontrast, where PIL's floating-point table is sometimes one
level below the exact quotient, and hue, which PIL computes in 8-bit HSV; here it is within one level of torchvision's
on tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.policies import Layer, Operation
from distill.data.rows import update

TABLES = range(Operation.INVERT.value, Operation.EQUALIZE.value + 1)
BLENDS = range(Operation.COLOR.value, Operation.SHARPNESS.value + 1)
LUMA = (19595, 38470, 7471)  # of R, G and B in 2**-16, as in PIL


def apply(images: Tensor, layer: Layer) -> None:
    """Apply each sample's operation, in place on uint8 [B, C, H, W]."""
    operation, argument, possible = layer
    if not possible.isdisjoint(TABLES):
        wanted = (operation >= TABLES.start) & (operation < TABLES.stop)
        update(images, wanted, _through_tables, images, operation, argument)
    if not possible.isdisjoint(BLENDS):
        wanted = (operation >= BLENDS.start) & (operation < BLENDS.stop)
        update(images, wanted, _blended, images, operation, argument)
    if Operation.HUE in possible and images.shape[1] == 3:
        update(images, operation == Operation.HUE.value, _shift_hue, images, argument)


def _blend(degenerate: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """uint8: `degenerate` at factor 0, `values` at 1, extrapolated beyond and clamped, as in PIL."""
    return (degenerate + factor * (values - degenerate)).clamp_(0, 255).to(torch.uint8)


def _through_tables(images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    entries = images.flatten(2)
    return tables(images, operation, argument).gather(2, entries.long()).view_as(images)


def tables(images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    """uint8 [B, C, 256]: the look-up table; the identity for other operations."""

    def given(which: Operation, otherwise: float) -> Tensor:
        return torch.where(operation == which.value, argument, otherwise)[:, None]

    level = torch.arange(256, device=images.device, dtype=torch.float32)
    base = torch.zeros_like(argument)
    update(base, operation == Operation.CONTRAST.value, _mean_grey, images)
    brightness = given(Operation.BRIGHTNESS, 1.0)
    factor = torch.where((operation == Operation.CONTRAST.value)[:, None], argument[:, None], brightness)
    added = level + given(Operation.SOLARIZE_ADD, 0.0) * (level < 128)
    table = _blend(base[:, None], added, factor)
    threshold = given(Operation.SOLARIZE, 256.0).masked_fill((operation == Operation.INVERT.value)[:, None], 0.0)
    table = torch.where(level >= threshold, 255 - table, table)
    dropped = 8 - given(Operation.POSTERIZE, 8.0).to(torch.int32)
    table = (table >> dropped) << dropped
    table = table[:, None].expand(-1, images.shape[1], -1).to(torch.uint8, memory_format=torch.contiguous_format)
    update(table, operation == Operation.AUTOCONTRAST.value, _stretched, images)
    update(table, operation == Operation.EQUALIZE.value, _equalized, images)
    return table


def _grey(images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> int32 [B, 1, H, W] in 0 .. 255: PIL's luma of RGB, the mean of any other channels."""
    if images.shape[1] != 3:
        return images.sum(1, keepdim=True, dtype=torch.int32) // images.shape[1]
    red, green, blue = (images[:, channel : channel + 1].int() * share for channel, share in enumerate(LUMA))
    return (red + green + blue + (1 << 15)) >> 16


def _mean_grey(images: Tensor) -> Tensor:
    """float32 [B]: the mean of the grey image, rounded to an integer."""
    pixels = images[0, 0].numel()
    return ((2 * _grey(images).sum((1, 2, 3)) + pixels) // (2 * pixels)).float()


def _stretched(images: Tensor) -> Tensor:
    """Tables of autocontrast: each channel's range to 0 .. 255; unchanged for a channel of one value."""
    # Not on uint8: torch 2.15's compiled CPU code returns 0 for its minimum.
    low, high = torch.aminmax(images.flatten(2).int(), dim=2, keepdim=True)
    level = torch.arange(256, device=images.device, dtype=torch.int32)
    table = (level - low).clamp_(min=0) * 255 // (high - low).clamp_(min=1)
    return torch.where(high > low, table.clamp_(max=255), level).to(torch.uint8)


def _equalized(images: Tensor) -> Tensor:
    """Tables of histogram equalization; unchanged for a channel with too few pixels below its brightest value."""
    entries = images.flatten(2).long()
    histogram = torch.zeros((*images.shape[:2], 256), dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, entries, torch.ones_like(entries))
    upto = histogram.cumsum(2)
    brightest = (histogram * (upto == entries.shape[2])).sum(2, keepdim=True)
    step = (entries.shape[2] - brightest) // 255
    table = (upto - histogram + step // 2) // step.clamp(min=1)
    level = torch.arange(256, device=images.device)
    return torch.where(step > 0, table.clamp_(max=255), level).to(torch.uint8)


def _blended(images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    """Saturation (blend with the grey image) or sharpness (blend with the smoothed image)."""
    values = images.float()
    # Saturation does not change images that are not RGB.
    degenerate = _grey(images).float().repeat(1, 3, 1, 1) if images.shape[1] == 3 else values.clone()
    update(degenerate, operation == Operation.SHARPNESS.value, _smooth, values)
    return _blend(degenerate, values, argument[:, None, None, None])


def _smooth(values: Tensor) -> Tensor:
    """PIL's ImageFilter.SMOOTH: a 3x3 mean with centre weight 5, rounded; the border is unchanged."""
    sums = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    sums = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = ((sums + 4 * values[:, :, 1:-1, 1:-1]) / 13).round_()
    return smooth


def _shift_hue(images: Tensor, turn: Tensor) -> Tensor:
    """RGB images with the hue shifted by `turn` circles (-1/2 to 1/2), at the same saturation and value (HSV).

    Hues are in units of sixths of a circle times the pixel's chroma, which avoids division.
    """
    red, green, blue = images.float().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    hue = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    circle = 6 * chroma
    hue = hue + circle * torch.where(turn < 0, turn + 1, turn)[:, None, None]  # from -chroma to 11 * chroma
    channels = []
    for offset in (5, 3, 1):
        sixths = hue + offset * chroma
        for _ in range(2):
            sixths = torch.where(sixths >= circle, sixths - circle, sixths)
        lacking = torch.minimum(torch.minimum(sixths, 4 * chroma - sixths), chroma).clamp_(min=0)
        channels.append((value - lacking).round_())
    return torch.stack(channels, 1).to(torch.uint8)
