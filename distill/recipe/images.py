"""Values of the recipe's keys on the decoding of images. No torch."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PIXELS = 178_956_970
"""Above this, Pillow takes an image for a decompression bomb."""


def rgb(colour: str | Sequence[int]) -> tuple[int, int, int]:
    """A colour by its CSS name or `#rrggbb`, or as three numbers.

    Raises:
        ValueError: it is none.
    """
    from PIL import ImageColor  # not for recipes that leave the default

    try:
        red, green, blue = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
        if min(red, green, blue) >= 0 and max(red, green, blue) <= 255:
            return red, green, blue
    except ValueError:  # unknown, or not three numbers
        pass
    raise ValueError("should be an opaque CSS colour, or three numbers from 0 to 255")
