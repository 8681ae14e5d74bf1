"""Decoding of images as a viewer shows them, and resizing to uint8 tensors of one size.

`decode` is the one way from a file, or an image of Pillow's, to pixels: folders, streams, timm's readers, Python
Datasets, `predict` and an export's transform call it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from distill.data.fitting import Box, cropped, padded, squashed
from distill.errors import InputError
from distill.recipe import Data
from distill.recipe.images import MAX_PIXELS, rgb

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
}
"""The formats that are opened, by Pillow's names, and how their files end. Pillow knows more, and gives some of them to
other programs (EPS to Ghostscript), by a file's first bytes, whatever its name."""
if importlib.util.find_spec("PIL.AvifImagePlugin") is None:  # before Pillow 11.3
    del FORMATS["AVIF"]
_NAMES = tuple(FORMATS)
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
RUNS_A_PROGRAM = "EPS"

GREY_MODES = frozenset({"1", "L", "LA", "La"})
MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
"""Of 8 bits per channel. The others have 16 or 32 bits, or floats, whose black and white are anybody's guess."""

WHITE = (255, 255, 255)
REMEDY = "; replace it or take it out of the data, or, in an image folder, set data.skip_unreadable=true"
LONGEST = 1000
"""Largest aspect ratio: beyond it, an image resized by its shorter side may not fit the memory."""

SMALL = 1000
"""Images of less than this part of data.max_pixels are not counted among those that are decoded together."""

RULES = "distill images 2"
"""Goes into what identifies packed and streamed images: change it when `decode` or `to_square` give other pixels."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAGS = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Where Pillow finds an orientation, except in TIFF files, which it turns itself."""

_log = logging.getLogger("distill")

T = TypeVar("T")
Source = str | Path | IO[bytes] | Image.Image
"""An image file, its content, or an image of Pillow's."""


class ImageRules(NamedTuple):
    """How images are decoded and resized: the recipe's `data.channels`, `data.background`, `data.max_pixels` and
    `data.fit`.
    """

    channels: int | None = None
    """1: greyscale, 3: colour, None: as each image is."""
    background: tuple[int, int, int] = WHITE
    """RGB, under transparent pixels and beside padded images."""
    max_pixels: int = MAX_PIXELS
    """Of an image, and of those together that threads decode at the same time."""
    fit: str = "crop"

    @classmethod
    def of(cls, spec: Data) -> ImageRules:
        return cls(spec.channels, rgb(spec.background), spec.max_pixels, spec.fit)

    @property
    def identity(self) -> str:
        """Changes with the pixels that these rules give."""
        return f"{RULES}, {self.channels} channels, on {self.background}, {self.fit}"

    @property
    def acceptance(self) -> str:
        """Changes with the images that can be decoded by these rules."""
        return f"{RULES}, up to {self.max_pixels} pixels"


CROPPED = ImageRules()


def decode(source: Source, name: str, rules: ImageRules, remedy: str = REMEDY) -> Image.Image:
    """The image as a viewer shows it: turned by its orientation tag, transparent pixels on the background, in PIL mode
    'L' or 'RGB'.

    Raises:
        InputError: it is damaged, of another format than `FORMATS`, too large, or of more than 8 bits per channel;
            begins with `name` and ends with `remedy`.
    """
    return decode_for(lambda image: image, source, name, rules, remedy)


def decode_for(
    use: Callable[[Image.Image], T], source: Source, name: str, rules: ImageRules, remedy: str = REMEDY
) -> T:
    """What `use` makes of the image of `decode`. Threads that are in `use` at the same time hold images of no more than
    `rules.max_pixels` together.
    """
    try:
        image = source if isinstance(source, Image.Image) else _open(source, rules.max_pixels)
        misfit = _misfit(image, rules)
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError and others
        raise InputError(f"{name}: {_reason(error)}{remedy}") from None
    if misfit is not None:
        raise InputError(f"{name}: {misfit}{remedy}")
    _say_if_reduced(image)
    pixels = math.prod(image.size)
    if SMALL * pixels < rules.max_pixels:
        return use(_load(image, name, rules, remedy))
    with _budget.share(pixels, rules.max_pixels):
        return use(_load(image, name, rules, remedy))


def _load(image: Image.Image, name: str, rules: ImageRules, remedy: str) -> Image.Image:
    try:
        image.load()
        image = _opaque(_upright(image), rules.background)
    except Exception as error:  # as above
        raise InputError(f"{name}: {_reason(error)}{remedy}") from None
    mode = image.mode if rules.channels is None else "L" if rules.channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def header_fault(file: str | Path | IO[bytes], rules: ImageRules) -> str | None:
    """What is wrong with an image's header; None: nothing."""
    try:
        if isinstance(file, Path) and not file.stat().st_size:
            return "is empty"
        with _open(file, rules.max_pixels) as image:
            return _misfit(image, rules)
    except Exception as error:  # see decode_for
        return _reason(error)


def size_of(source: Source, name: str, rules: ImageRules) -> tuple[int, int]:
    """Width and height, not turned, by the header only.

    Raises:
        InputError: it has none.
    """
    return _by_header(lambda image: image.size, source, name, rules)


def is_grey(source: Source, name: str, rules: ImageRules) -> bool:
    """Whether `decode` gives 'L' if `rules.channels` is None; reads the header only.

    Raises:
        InputError: it has none.
    """

    def shown_grey(image: Image.Image) -> bool:
        return image.mode in GREY_MODES and (_is_grey(rules.background) or not image.has_transparency_data)

    return _by_header(shown_grey, source, name, rules)


def _by_header(look: Callable[[Image.Image], T], source: Source, name: str, rules: ImageRules) -> T:
    try:
        if isinstance(source, Image.Image):
            return look(source)
        with _open(source, rules.max_pixels) as image:
            return look(image)
    except Exception as error:  # see decode_for
        raise InputError(f"{name}: {_reason(error)}{REMEDY}") from None


def _open(file: str | Path | IO[bytes], max_pixels: int) -> Image.Image:
    """The opened file, of which only the header is read."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow refuses twice as many, wherever it allocates an image
    return Image.open(file, formats=_NAMES)


def _reason(error: Exception) -> str:
    """What Pillow says of a file that it cannot decode."""
    if isinstance(error, UnidentifiedImageError):
        return f"cannot be decoded as an image (it is none of {', '.join(FORMATS)})"
    own = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    advice = ", which in training data.max_pixels can raise" if isinstance(error, Image.DecompressionBombError) else ""
    return f"cannot be decoded as an image ({own.rstrip('.') or type(error).__name__}{advice})"


def _misfit(image: Image.Image, rules: ImageRules) -> str | None:
    """Why an opened image is unusable, if it is."""
    width, height = image.size
    if image.format == RUNS_A_PROGRAM:
        return f"is of the format {image.format}, which is none of {', '.join(FORMATS)}"
    if max(width, height) > LONGEST * min(width, height):
        return f"{width} x {height} pixels are no picture"
    if width * height > rules.max_pixels:
        return (
            f"has {width * height:,} pixels ({width} x {height}), more than data.max_pixels, {rules.max_pixels:,}; "
            "shrink it or raise that limit"
        )
    if image.mode not in MODES:
        return f"has pixels of PIL mode {image.mode}; convert it to 8 bits per channel"
    return None


def _say_if_reduced(image: Image.Image) -> None:
    """Images of 16 bits per channel in colour, or with an alpha channel, come from Pillow in 8 bits, scaled."""
    tiles = getattr(image, "tile", ())
    if tiles and ";16" in str(tiles[0][3]):
        _say("data: images of 16 bits per channel are scaled to 8 bits: 65535 is 255")


@cache
def _say(text: str) -> None:
    """Log it, once in a process."""
    _log.info(text)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation tag says, by EXIF or XMP."""
    if _TAGS.isdisjoint(image.info):
        return image
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # viewers do not mind damaged tags, and they were never an error here
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """On the background, 'L' or 'RGB'."""
    mode = "L" if image.mode in GREY_MODES else "RGB"
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = layer.getchannel("A")
        if alpha.getextrema() != (255, 255):
            canvas = Image.new("RGB", image.size, background)
            canvas.paste(layer, mask=alpha)
            return canvas.convert(mode) if _is_grey(background) else canvas
        image = layer
    return image if image.mode == mode else image.convert(mode)


def _is_grey(colour: tuple[int, int, int]) -> bool:
    return len(set(colour)) == 1


class _Budget:
    """Lets threads decode at the same time as long as their images together stay below a limit."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # its threads do not exist there

    def reset(self) -> None:
        self._changed = threading.Condition()
        self._pixels = 0

    @contextmanager
    def share(self, pixels: int, limit: int) -> Iterator[None]:
        """Wait until so many pixels fit beside those of the other threads."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pixels or self._pixels + pixels <= limit)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_budget = _Budget()


def read_square(source: Source, name: str, resolution: int, rules: ImageRules) -> Tensor:
    """The decoded image, cropped and resized by `to_square`, within the limit on pixels of all threads."""
    return decode_for(lambda image: to_square(image, resolution, None, rules), source, name, rules)


def stack(squares: Iterable[Tensor], count: int) -> Tensor:
    """uint8 [count, C, R, R] of as many uint8 [1 or 3, R, R]; C is 1 if it is for all of them."""
    images = torch.empty(0)
    for row, square in enumerate(squares):
        if row == 0:
            images = square.new_empty(count, *square.shape)
        elif len(square) > images.shape[1]:
            grey, images = images[:row], square.new_empty(count, *square.shape)
            images[:row] = grey
        images[row] = square
    return images


def to_square(image: Image.Image, resolution: int, box: Box | None, rules: ImageRules = CROPPED) -> Tensor:
    """uint8 [C, resolution, resolution]: the box of `frame` cropped and resized; without a box, by `rules.fit`: the
    shorter side resized and the centre cropped, the image squashed, or the longer side resized and the rest filled with
    the background.

    Bicubic with antialiasing, as in DeiT; an image that has the size already is not changed.
    """
    if rules.fit == "squash":
        image = squashed(image, resolution, box)
    elif rules.fit == "pad":
        image = padded(image, resolution, box, rules.background)
    else:
        image = cropped(image, resolution, box)
    pixels = np.asarray(image)
    return torch.from_numpy(pixels[None].copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
