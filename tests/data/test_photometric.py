"""Each operation on colours against PIL (byte for byte) and torchvision on tensors (within one grey level)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from distill.data import photometric, rows
from distill.data.policies import Layer, Operation
from results.augmentation.one_by_one import operate

Photos = Callable[..., Tensor]
FACTORS = (0.0, 0.1, 0.37, 0.905, 1.0, 1.3, 1.9, 2.5)
ARGUMENTS = {
    Operation.IDENTITY: (0.0,),
    Operation.INVERT: (0.0,),
    Operation.POSTERIZE: (1, 2, 4, 7, 8),
    Operation.SOLARIZE: (0, 26, 128, 170, 255),
    Operation.SOLARIZE_ADD: (0, 1, 99, 110),
    Operation.BRIGHTNESS: FACTORS,
    Operation.CONTRAST: FACTORS,
    Operation.AUTOCONTRAST: (0.0,),
    Operation.EQUALIZE: (0.0,),
    Operation.COLOR: FACTORS,
    Operation.SHARPNESS: FACTORS,
}
EVERYTHING = frozenset(Operation)


def applied(images: Tensor, operation: Operation, argument: float) -> Tensor:
    result = images.clone()
    count = len(images)
    layer = Layer(torch.full((count,), int(operation)), torch.full((count,), float(argument)), EVERYTHING)
    photometric.apply(result, layer)
    return result


def hardest(photos: Photos, channels: int) -> Tensor:
    """Photographs, then images at the limits: noise, few values, one value, one pixel off."""
    images = photos(20, channels)
    generator = torch.Generator().manual_seed(1)
    images[-6] = torch.randint(0, 256, images.shape[1:], generator=generator)
    images[-5] = torch.randint(0, 2, images.shape[1:], generator=generator) * 255
    images[-4] = torch.randint(100, 104, images.shape[1:], generator=generator)
    images[-3], images[-2], images[-1] = 0, 77, 255
    images[-2, :, 3, 4] = 200
    return images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", ARGUMENTS)
def test_operations_are_pils(photos: Photos, operation: Operation, channels: int) -> None:
    images = hardest(photos, channels)
    for argument in ARGUMENTS[operation]:
        expected = [tv.pil_to_tensor(operate(tv.to_pil_image(image), operation, argument, ())) for image in images]
        difference = (applied(images, operation, argument).int() - torch.stack(expected).int()).abs()
        # PIL multiplies by a rounded 255 / range and cuts the digits off.
        assert difference.max() <= (1 if operation == Operation.AUTOCONTRAST else 0)
        assert (difference == 0).float().mean() > 0.99


TENSOR_FORMS: dict[Operation, Callable[[Tensor, float], Tensor]] = {
    Operation.INVERT: lambda images, _: tv.invert(images),
    Operation.POSTERIZE: lambda images, bits: tv.posterize(images, int(bits)),
    Operation.SOLARIZE: tv.solarize,
    Operation.BRIGHTNESS: tv.adjust_brightness,
    Operation.CONTRAST: tv.adjust_contrast,
    Operation.AUTOCONTRAST: lambda images, _: tv.autocontrast(images),
    Operation.EQUALIZE: lambda images, _: tv.equalize(images),
    Operation.COLOR: tv.adjust_saturation,
    Operation.SHARPNESS: tv.adjust_sharpness,
    Operation.HUE: tv.adjust_hue,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", TENSOR_FORMS)
def test_operations_are_torchvisions_within_one_level(photos: Photos, operation: Operation, channels: int) -> None:
    images = hardest(photos, channels)
    for argument in ARGUMENTS.get(operation, (-0.5, -0.21, 0.0, 0.04, 1 / 3, 0.5)):
        if argument == 2.5:  # multiplies the half level by which greys are rounded otherwise; no policy goes there
            continue
        expected = torch.stack([TENSOR_FORMS[operation](image, argument) for image in images])
        difference = (applied(images, operation, argument).int() - expected.int()).abs()
        assert difference.max() <= 1


def mixed(count: int) -> Layer:
    """All operations in one batch, each several times with different arguments."""
    choices = [(key, value) for key, values in ARGUMENTS.items() for value in values]
    choices += [(Operation.HUE, 0.1), (Operation.HUE, -0.4), (Operation.ROTATE, 30.0)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2)) % len(choices)
    assert count >= len(choices)
    return Layer(
        torch.tensor([int(choices[place][0]) for place in order]),
        torch.tensor([float(choices[place][1]) for place in order]),
        EVERYTHING,
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_each_sample_gets_its_own_operation(photos: Photos, channels: int) -> None:
    images = photos(80, channels)
    layer = mixed(80)
    result = images.clone()
    photometric.apply(result, layer)
    for row, (operation, argument) in enumerate(zip(layer.operation.tolist(), layer.argument.tolist(), strict=True)):
        assert torch.equal(result[row : row + 1], applied(images[row : row + 1], Operation(operation), argument))
    assert len({image.numpy().tobytes() for image in result}) > 70


@pytest.mark.parametrize("channels", [1, 3])
def test_the_form_for_devices_that_must_not_wait_gives_the_same(
    photos: Photos, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, layer = photos(80, channels), mixed(80)
    picked, masked = images.clone(), images.clone()
    photometric.apply(picked, layer)
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)
    photometric.apply(masked, layer)
    assert torch.equal(picked, masked)
    monkeypatch.setattr(rows, "DEVICE_PART", 5000)  # several parts, of unequal size
    masked.copy_(images)
    photometric.apply(masked, layer)
    assert torch.equal(picked, masked)


@pytest.mark.parametrize("operation", [Operation.COLOR, Operation.HUE])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_what_has_no_colour_keeps_it(photos: Photos, operation: Operation, channels: int) -> None:
    images = photos(4, channels)
    assert torch.equal(applied(images, operation, 0.3), images)


def test_layers_that_cannot_draw_an_operation_do_not_look_for_it(photos: Photos) -> None:
    images = photos(3)
    layer = Layer(torch.full((3,), int(Operation.INVERT)), torch.zeros(3), frozenset({Operation.HUE}))
    result = images.clone()
    photometric.apply(result, layer)
    assert torch.equal(result, images)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
def test_images_of_a_few_pixels(photos: Photos, size: tuple[int, int]) -> None:
    images = photos(5, 3, 12, 12)[:, :, : size[0], : size[1]]
    for operation in (Operation.SHARPNESS, Operation.EQUALIZE, Operation.AUTOCONTRAST, Operation.CONTRAST):
        expected = [tv.pil_to_tensor(operate(tv.to_pil_image(image), operation, 1.7, ())) for image in images]
        assert (applied(images, operation, 1.7).int() - torch.stack(expected).int()).abs().max() <= 1
