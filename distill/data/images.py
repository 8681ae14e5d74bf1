"""Decoding and resizing of image files to uint8 tensors of one size."""

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

REMEDY = "replace it or take it out of the data, or, in an image folder, set data.skip_unreadable=true"
LONGEST = 1000
"""Largest aspect ratio: beyond it, an image resized by its shorter side may not fit the memory."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def decode(file: str | Path | IO[bytes], name: str, mode: str | None) -> Image.Image:
    """The image in PIL mode `mode` ('L' or 'RGB'; None: its own); raises InputError naming it if it cannot be
    decoded.
    """
    try:
        image = Image.open(file)
        image.load()
    except Exception as error:  # for broken files PIL raises OSError, SyntaxError, ValueError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be decoded as an image ({reason}); {REMEDY}") from None
    return as_mode(image, name, mode)


def as_mode(image: Image.Image, name: str, mode: str | None) -> Image.Image:
    """A decoded image in PIL mode `mode` (None: its own); raises InputError naming it if it is unusable."""
    if (misfit := _misfit(image)) is not None:
        raise InputError(f"{name}: {misfit}; {REMEDY}")
    return image if mode is None or image.mode == mode else image.convert(mode)


def _misfit(image: Image.Image) -> str | None:
    """Why a decoded image is unusable, if it is."""
    if max(image.size) > LONGEST * min(image.size):
        return f"{image.width} x {image.height} pixels are no picture"
    if image.mode not in EIGHT_BIT_MODES:
        return f"has pixels of PIL mode {image.mode}; convert it to 8 bits per channel"
    return None


def header_fault(path: Path) -> str | None:
    """What is wrong with a file's image header; None: nothing."""
    try:
        if not path.stat().st_size:
            return "is empty"
        with Image.open(path) as image:
            return _misfit(image)
    except OSError as error:
        return f"cannot be read ({error.strerror})" if error.strerror else "does not begin like an image"
    except Exception:  # see decode
        return "does not begin like an image"


def common_mode(images: Iterable[Image.Image]) -> str:
    """'L' if all of these are greyscale, else 'RGB'."""
    return "L" if all(image.mode in GREY_MODES for image in images) else "RGB"


def to_square(image: Image.Image, resolution: int, box: Box | None) -> Tensor:
    """uint8 [C, resolution, resolution]: the box cropped and resized; without a box, the shorter side resized, then a
    centre crop.

    Bicubic with antialiasing, as in DeiT; an image that has the size already is not changed.
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
