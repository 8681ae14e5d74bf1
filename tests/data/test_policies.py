"""What is drawn against timm's and torchvision's own tables, and how often."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from distill.data import photometric
from distill.data.affine import resample
from distill.data.policies import JITTERED, MOVES, Layer, Operation, Operations, Policy, rand_augment, trivial_augment
from distill.data.randomness import hashes, keys
from distill.recipe import Augment
from distill.recipe.augment import RandAugment

HEIGHT, WIDTH = 24, 32
TIMM = {
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
    "Rotate": Operation.ROTATE,
    "PosterizeIncreasing": Operation.POSTERIZE,
    "SolarizeIncreasing": Operation.SOLARIZE,
    "SolarizeAdd": Operation.SOLARIZE_ADD,
    "ColorIncreasing": Operation.COLOR,
    "ContrastIncreasing": Operation.CONTRAST,
    "BrightnessIncreasing": Operation.BRIGHTNESS,
    "SharpnessIncreasing": Operation.SHARPNESS,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateXRel": Operation.TRANSLATE_X,
    "TranslateYRel": Operation.TRANSLATE_Y,
}
FACTORS = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.SHARPNESS)
TORCHVISION = {
    "Identity": Operation.IDENTITY,
    "Color": Operation.COLOR,
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
    "Posterize": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "Contrast": Operation.CONTRAST,
    "Brightness": Operation.BRIGHTNESS,
    "Sharpness": Operation.SHARPNESS,
    "Rotate": Operation.ROTATE,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
}


def arguments(policy: Policy, operation: Operation) -> Tensor:
    return policy.arguments[:-1][policy.operations[:-1] == operation]


def cell(policy: Policy, operation: Operation, number: int) -> int:
    return int((policy.operations == operation).nonzero()[number, 0])


def test_the_operations_are_those_of_timms_increasing_set() -> None:
    policy = rand_augment(RandAugment(), HEIGHT, WIDTH)
    assert {TIMM[name] for name in auto_augment._RAND_INCREASING_TRANSFORMS} == policy.possible
    assert len(TIMM) == len(policy.possible) == 15


@pytest.mark.parametrize(("magnitude", "std"), [(9.0, 0.5), (5.0, 3.0), (0.0, 0.0), (7.0, 0.0), (10.0, 0.0)])
def test_arguments_are_timms_of_a_normal_magnitude(
    magnitude: float, std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = rand_augment(RandAugment(magnitude=magnitude, magnitude_std=std), HEIGHT, WIDTH)
    quantiles = stats.norm.ppf((np.arange(1024) + 0.5) / 1024).astype(np.float32).astype(np.float64)
    levels = [min(max(level, 0.0), 10.0) for level in magnitude + std * quantiles]
    scales = {Operation.TRANSLATE_X: WIDTH, Operation.TRANSLATE_Y: HEIGHT}
    for name, operation in TIMM.items():
        argument = auto_augment.LEVEL_TO_ARG[name]
        if argument is None:
            continue
        expected: list[float] = []
        for sign in (1, -1):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            expected += [argument(level, {})[0] * scales.get(operation, 1) for level in levels]
        if operation == Operation.POSTERIZE:
            expected = [max(1, bits) for bits in expected]
        difference = (arguments(policy, operation) - torch.tensor(expected, dtype=torch.float64)).abs()
        whole = operation in (Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD)
        assert difference.max() <= (0 if whole else 2**-16), name


def carried_out(policy: Policy, number: int, image: Image.Image, fill: tuple[int, ...]) -> Tensor:
    """The image after the policy's cell of this number."""
    images = tv.pil_to_tensor(image)[None]
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    boxes = (zero, zero, one * images.shape[2], one * images.shape[3])
    result = resample(images, policy.moves[number][None], *boxes, fill=torch.tensor(fill, dtype=torch.uint8))
    layer = Layer(policy.operations[number][None], policy.arguments[number][None], policy.possible)
    photometric.apply(result, layer)
    return result[0]


@pytest.mark.parametrize("magnitude", [0, 3, 7, 9, 10])
@pytest.mark.parametrize("name", TIMM)
def test_cells_do_what_timms_operations_do_to_a_pil_image(
    photos: Callable[..., Tensor], name: str, magnitude: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, fill = tv.to_pil_image(photos(1, 3, HEIGHT, WIDTH)[0]), (120, 110, 100)
    policy = rand_augment(RandAugment(magnitude=float(magnitude), magnitude_std=0.0), HEIGHT, WIDTH)
    hparams = {"img_mean": fill, "interpolation": Image.Resampling.BILINEAR}
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    for sign in (1, -1):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        ours = carried_out(policy, cell(policy, TIMM[name], 0 if sign > 0 else 1024), image, fill)
        no_bits = name == "PosterizeIncreasing" and magnitude == 10  # which newer versions of Pillow refuse
        expected = auto_augment.posterize(image, 1) if no_bits else theirs(image)
        difference = (ours.int() - tv.pil_to_tensor(expected).int()).abs()
        # PIL cuts digits off where it resamples; factors are multiples of 2**-15.
        assert difference.max() <= (1 if TIMM[name] in (*MOVES, *FACTORS, Operation.AUTOCONTRAST) else 0)
        assert (difference == 0).float().mean() > (0.4 if TIMM[name] in MOVES else 0.8)


def test_trivial_augment_has_torchvisions_operations_and_ranges() -> None:
    policy = trivial_augment(HEIGHT, WIDTH)
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert {TORCHVISION[name] for name in space} == policy.possible
    for name, (magnitudes, signed) in space.items():
        values = magnitudes(31, HEIGHT, WIDTH)
        if values is None:
            continue
        expected = values.double()
        # Their float32 has 15.999998 where the range has 16.
        if name.startswith("Translate"):
            expected = (expected + 1e-4).trunc()
        elif name == "Solarize":  # values from the threshold on, which need not be whole
            expected = (255 * expected - 1e-4).ceil()
        expected = torch.cat((expected, -expected if signed else expected))
        if TORCHVISION[name] in FACTORS:
            expected = 1 + expected
        torch.testing.assert_close(arguments(policy, TORCHVISION[name]).double(), expected, atol=2e-5, rtol=0)


def drawn(count: int, **spec: object) -> tuple[list[Layer], Tensor, Tensor | None]:
    operations = Operations(Augment(**spec), torch.device("cpu"))
    operations.prepare(HEIGHT, WIDTH)
    return operations.draw(hashes(keys(0, 0, operations.draws), torch.arange(count)))


@pytest.mark.parametrize(("spec", "probability"), [({"num_ops": 3, "probability": 0.3}, 0.3), ({}, 0.5)])
def test_operations_of_rand_augment_are_equally_likely(spec: dict[str, float], probability: float) -> None:
    count = 20_000
    layers, _, _ = drawn(count, rand_augment=spec)
    assert len(layers) == spec.get("num_ops", 2)
    for layer in layers:
        seen = torch.bincount(layer.operation, minlength=len(Operation))
        applied = count - int(seen[Operation.IDENTITY])
        assert stats.binomtest(applied, count, probability).pvalue > 1e-3
        assert stats.chisquare([int(seen[operation]) for operation in layer.possible]).pvalue > 1e-3
        angles = layer.argument[layer.operation == Operation.ROTATE]
        assert stats.binomtest(int((angles > 0).sum()), len(angles)).pvalue > 1e-3
        below = angles.abs()[angles.abs() < 30]  # magnitude 10, where the normal is cut off
        assert stats.kstest(below.numpy(), stats.truncnorm(-np.inf, 2.0, 27.0, 1.5).cdf).pvalue > 1e-3
    first, second = (layer.operation for layer in layers[:2])
    table = torch.zeros(len(Operation), len(Operation)).index_put_((first, second), torch.ones(count), accumulate=True)
    kept = [int(operation) for operation in (*layers[0].possible, Operation.IDENTITY)]
    assert stats.chi2_contingency(table[kept][:, kept].numpy()).pvalue > 1e-3


def test_operations_of_trivial_augment_are_equally_likely_and_always_one() -> None:
    layers, _, moving = drawn(20_000, trivial_augment=True)
    assert len(layers) == 1
    seen = torch.bincount(layers[0].operation, minlength=len(Operation))
    assert stats.chisquare([int(seen[operation]) for operation in layers[0].possible]).pvalue > 1e-3
    assert int(seen.sum()) == sum(int(seen[operation]) for operation in layers[0].possible)
    bits = layers[0].argument[layers[0].operation == Operation.POSTERIZE]
    assert set(bits.tolist()) == {2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}
    moved = (layers[0].operation >= MOVES.start) & (layers[0].operation < MOVES.stop)
    assert moving is not None
    assert torch.equal(moving, moved & (layers[0].argument != 0))


def test_color_jitter_has_torchvisions_ranges_in_every_order() -> None:
    spec = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    theirs = v2.ColorJitter(**spec)
    layers, _, moving = drawn(20_000, color_jitter=spec)
    assert moving is None
    orders = torch.stack([layer.operation for layer in layers], 1)
    counts = [int((orders == torch.tensor(order)).all(1).sum()) for order in permutations(JITTERED)]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts).pvalue > 1e-3
    for operation, name in JITTERED.items():
        factors = torch.cat([layer.argument[layer.operation == operation] for layer in layers])
        low, high = getattr(theirs, name)
        assert stats.kstest(factors.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert low - 2**-12 <= factors.min() <= factors.max() <= high + 2**-12


def test_color_jitter_has_only_what_is_asked_for() -> None:
    layers, _, _ = drawn(10, color_jitter={"hue": 0.1})
    assert [set(layer.operation.tolist()) for layer in layers] == [{Operation.HUE}]
    assert drawn(10, color_jitter={})[0] == []
    assert Operations(Augment(color_jitter={"hue": 0.0}), torch.device("cpu")).draws == []


def test_a_jitter_factor_does_not_depend_on_the_others_being_on() -> None:
    alone = drawn(50, color_jitter={"contrast": 0.4})[0][0].argument
    layers = drawn(50, color_jitter={"brightness": 0.2, "contrast": 0.4, "hue": 0.5})[0]
    both = sum(torch.where(layer.operation == Operation.CONTRAST, layer.argument, 0) for layer in layers)
    assert torch.equal(alone, both)
