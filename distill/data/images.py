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

REMEDY = "replace it or take it out of the data, or, in an image folder, set data.skip_unreadable=true"
LONGEST = 1000
"""Times the shorter side: resizing that to the resolution would make the longer one more than memory holds."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def decode(file: str | Path | IO[bytes], name: str, mode: str | None) -> Image.Image:
    """A decoded image in PIL mode `mode` ('L' or 'RGB'; None: the one it has). InputError naming it if it cannot be
    decoded.
    """
    try:
        image = Image.open(file)
        image.load()
    except Exception as error:  # besides OSError, broken files bring PIL to anything from SyntaxError to ValueError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be decoded as an image ({reason}); {REMEDY}") from None
    return as_mode(image, name, mode)


def as_mode(image: Image.Image, name: str, mode: str | None) -> Image.Image:
    """A decoded image in PIL mode `mode` (None: the one it has). InputError naming it if it is no use."""
    if (misfit := _misfit(image)) is not None:
        raise InputError(f"{name}: {misfit}; {REMEDY}")
    return image if mode is None or image.mode == mode else image.convert(mode)


def _misfit(image: Image.Image) -> str | None:
    """What makes an image no use, though it can be decoded."""
    if max(image.size) > LONGEST * min(image.size):
        return f"{image.width} x {image.height} pixels are no picture"
    if image.mode not in EIGHT_BIT_MODES:
        return f"has pixels of PIL mode {image.mode}; convert it to 8 bits per channel"
    return None


def header_fault(path: Path) -> str | None:
    """What is wrong with a file that does not begin like an image; None where it does."""
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
