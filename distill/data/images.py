"""Image files -> uint8 tensors of one size: what decoding workers and the packing of a folder do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.errors import InputError

GREY_MODES = frozenset({"1", "L", "LA"})
EIGHT_BIT_MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def decode(file: str | Path | IO[bytes], name: str, mode: str | None) -> Image.Image:
    """A decoded image in PIL mode `mode` ('L' or 'RGB'; None: the one it has). InputError naming it if it cannot be
    decoded.
    """
    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
        raise InputError(
            f"{name}: cannot be decoded as an image ({error}); replace it or take it out of the data"
        ) from None
    if image.mode not in EIGHT_BIT_MODES:
        raise InputError(f"{name}: has pixels of PIL mode {image.mode}; convert it to 8 bits per channel")
    return image if mode is None or image.mode == mode else image.convert(mode)


def common_mode(images: Iterable[Image.Image]) -> str:
    """'L' if all of these are greyscale, else 'RGB'."""
    return "L" if all(image.mode in GREY_MODES for image in images) else "RGB"


def to_square(image: Image.Image, resolution: int, box: Box | None) -> Tensor:
    """uint8 [C, resolution, resolution]: the box cut out and resized; without one, the shorter side resized, then the
    centre cut out.

    Bicubic with antialiasing, as DeiT does; an image that has the size already is left as it is.
    """
    if box is not None:
        top, left, height, width = box
        image = image.crop((left, top, left + width, top + height))
        size = (resolution, resolution)
    else:
        shorter = min(image.size)
        size = (image.width * resolution // shorter, image.height * resolution // shorter)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((image.width - resolution) / 2), round((image.height - resolution) / 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
