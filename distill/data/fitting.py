"""From images of any shape to squares: `data.fit`, for whole images and for random crops of them."""

from __future__ import annotations

from PIL import Image

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


def frame(image: Image.Image, fit: str) -> tuple[int, int]:
    """Height and width of what boxes are cut from: the image, or the square that it is squashed or padded to."""
    return (image.height, image.width) if fit == "crop" else (max(image.size),) * 2


def cropped(image: Image.Image, resolution: int, box: Box | None) -> Image.Image:
    if box is not None:
        top, left, height, width = box
        image = image.crop((left, top, left + width, top + height))
        size = (resolution, resolution)
    else:
        shorter = min(image.size)
        size = (image.width * resolution // shorter, image.height * resolution // shorter)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image.size == (resolution, resolution):
        return image
    left, top = round((image.width - resolution) / 2), round((image.height - resolution) / 2)
    return image.crop((left, top, left + resolution, top + resolution))


def squashed(image: Image.Image, resolution: int, box: Box | None) -> Image.Image:
    side = max(image.size)
    top, left, height, width = box or (0, 0, side, side)
    across, down = image.width / side, image.height / side
    part = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=part)


def padded(image: Image.Image, resolution: int, box: Box | None, background: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of the background, of which the box is cut."""
    side = max(image.size)
    top, left, height, width = box or (0, 0, side, side)
    canvas = Image.new("RGB", (resolution, resolution), background).convert(image.mode)
    edges = []
    for start, length, own in ((left, width, image.width), (top, height, image.height)):
        before = (side - own) // 2
        low, high = max(start, before), min(start + length, before + own)
        if low >= high:  # nothing but background
            return canvas
        first, last = ((2 * (edge - start) * resolution + length) // (2 * length) for edge in (low, high))  # rounded
        first = min(first, resolution - 1)
        last = max(last, first + 1)
        edges.append((low - before, high - before, first, last))
    (left, right, x, x_end), (top, bottom, y, y_end) = edges
    part = image.resize((x_end - x, y_end - y), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    canvas.paste(part, (x, y))
    return canvas
