"""The augmentation of one image after the other with torchvision on PIL images, each operation in its turn with its own
resampling: what the batched form of `distill.data` is compared with, in the tests and in `paired_run.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from distill.data.policies import Operation


def augment(
    image: Tensor,
    *,
    top: int,
    left: int,
    flip: bool,
    operations: Iterable[tuple[Operation, float]],
    fill: Sequence[int],
) -> Tensor:
    """uint8 [C, H, W] -> the same: the box of the image's own size from (top, left) on, with black around the image,
    mirrored where `flip`, then the operations with their arguments in their order.
    """
    cut = tv.crop(tv.to_pil_image(image), top, left, *image.shape[1:])
    result = tv.horizontal_flip(cut) if flip else cut
    for operation, argument in operations:
        result = operate(result, operation, argument, fill)
    return tv.pil_to_tensor(result)


def operate(image: Image.Image, operation: Operation, argument: float, fill: Sequence[int]) -> Image.Image:
    """One operation on a PIL image of mode RGB or L; `fill` has a value for each channel."""

    def affine(translate: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Image.Image:
        degrees = [math.degrees(math.atan(factor)) for factor in shear]
        return tv.affine(
            image,
            angle=0.0,
            translate=list(translate),
            scale=1.0,
            shear=degrees,
            interpolation=InterpolationMode.BILINEAR,
            fill=list(fill),
            center=[0, 0],
        )

    match operation:
        case Operation.IDENTITY:
            return image
        case Operation.SHEAR_X:
            return affine(shear=(argument, 0))
        case Operation.SHEAR_Y:
            return affine(shear=(0, argument))
        case Operation.TRANSLATE_X:
            return affine(translate=(-argument, 0))
        case Operation.TRANSLATE_Y:
            return affine(translate=(0, -argument))
        case Operation.ROTATE:
            return tv.rotate(image, argument, InterpolationMode.BILINEAR, fill=list(fill))
        case Operation.INVERT:
            return tv.invert(image)
        case Operation.POSTERIZE:
            return tv.posterize(image, int(argument))
        case Operation.SOLARIZE:
            return tv.solarize(image, argument)
        case Operation.SOLARIZE_ADD:
            table = [min(255, value + int(argument)) if value < 128 else value for value in range(256)]
            return image.point(table * len(image.getbands()))
        case Operation.BRIGHTNESS:
            return tv.adjust_brightness(image, argument)
        case Operation.CONTRAST:
            return tv.adjust_contrast(image, argument)
        case Operation.AUTOCONTRAST:
            return tv.autocontrast(image)
        case Operation.EQUALIZE:
            return tv.equalize(image)
        case Operation.COLOR:
            return tv.adjust_saturation(image, argument)
        case Operation.SHARPNESS:
            return tv.adjust_sharpness(image, argument)
        case Operation.HUE:
            return tv.adjust_hue(image, argument)
