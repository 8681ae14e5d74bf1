"""The drawn operations inside the whole augmentation, against one image after the other through torchvision and PIL."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.data import rows
from distill.data.augment import Augmenter
from distill.data.policies import MOVES, Operation, Policy, rand_augment, trivial_augment
from distill.data.randomness import hashes, keys
from distill.recipe import Augment
from results.augmentation import one_by_one

SEED, EPOCH, CLASSES = 11, 4, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
Photos = Callable[..., Tensor]
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}  # PIL has a hue of its own


def augmenter(channels: int = 3, **spec: object) -> Augmenter:
    device = torch.device("cpu")
    return Augmenter(Augment(**spec), num_classes=CLASSES, mean=MEAN[:channels], std=STD[:channels], device=device)


def augmented(data: tuple[Tensor, Tensor, Tensor], **spec: object) -> tuple[Tensor, Tensor]:
    return augmenter(data[0].shape[1], **spec)(*data, seed=SEED, epoch=EPOCH)


def draw(name: str, index: int) -> int:
    return int(hashes(keys(SEED, EPOCH, [name]), torch.tensor([index]))[0, 0])


def share(name: str, index: int) -> float:
    return (draw(name, index) >> 8) / 2**24


def below(name: str, index: int, bound: int) -> int:
    return draw(name, index) * bound >> 32


def photo_batch(photos: Photos, count: int, channels: int = 3, size: tuple[int, int] = (24, 32)):
    labels = torch.arange(count) % CLASSES
    return photos(count, channels, *size), labels, torch.arange(count) * 37 + 5


def plain_operations(augment: Augment, policy: Policy, index: int) -> list[tuple[Operation, float]]:
    """What a sample gets, from its hashes."""
    operations = []
    spec = augment.rand_augment
    layers, probability = (int(augment.trivial_augment), 1.0) if spec is None else (spec.num_ops, spec.probability)
    for layer in range(layers):
        cell = below(f"policy/{layer}", index, len(policy.operations) - 1)
        if share(f"policy/{layer}/whether", index) < probability:
            operations.append((Operation(int(policy.operations[cell])), float(policy.arguments[cell])))
    if augment.color_jitter is not None:
        jitter = [
            ("brightness", Operation.BRIGHTNESS),
            ("contrast", Operation.CONTRAST),
            ("saturation", Operation.COLOR),
        ]
        for name, operation in list(itertools.permutations(jitter))[below("color-jitter/order", index, 6)]:
            middle = (below(f"color-jitter/{name}", index, 4096) + 0.5) / 4096
            operations.append((operation, round((0.6 + middle * 0.8) * 2**15) / 2**15))
    return operations


@pytest.mark.parametrize(
    ("spec", "channels", "moves"),
    [
        ({"rand_augment": {}}, 1, 10),
        ({"rand_augment": {}}, 3, 10),
        ({"rand_augment": {"num_ops": 3, "magnitude": 5.0, "magnitude_std": 2.0, "probability": 0.6}}, 3, 5),
        ({"trivial_augment": True}, 3, 20),
        ({"color_jitter": JITTER}, 1, 0),
        ({"color_jitter": JITTER}, 3, 0),
        ({"rand_augment": {}, "color_jitter": JITTER}, 3, 0),
    ],
)
def test_operations_are_those_of_one_image_after_the_other(
    photos: Photos, spec: dict[str, object], channels: int, moves: int
) -> None:
    """Exactly where nothing is resampled; within a level of rounding where one operation moves and none after it may
    enlarge the difference.
    """
    padding, fill = 3, [round(255 * mean) for mean in MEAN[:channels]]
    augment = Augment(crop_padding=padding, hflip=True, **spec)
    policy = trivial_augment(24, 32) if augment.rand_augment is None else rand_augment(augment.rand_augment, 24, 32)
    data = images, _, indices = photo_batch(photos, 120, channels)
    floats, _ = augmented(data, crop_padding=padding, hflip=True, **spec)
    exact = moved = late = 0
    for image, index, result in zip(images, indices.tolist(), floats, strict=True):
        operations = plain_operations(augment, policy, index)
        kinds = [operation for operation, _ in operations]
        top, left = (below(f"crop/{axis}", index, 2 * padding + 1) - padding for axis in "yx")
        flip = share("flip", index) < 0.5
        expected = one_by_one.augment(image, top=top, left=left, flip=flip, operations=operations, fill=fill)
        if Operation.AUTOCONTRAST in kinds:  # some levels are one lower in PIL
            continue
        if not set(kinds) & set(MOVES):
            exact += 1
            assert torch.equal(result, expected.float() / 255)
            continue
        first = next(number for number, kind in enumerate(kinds) if kind in MOVES)
        if not set(kinds[first + 1 :]) - {Operation.INVERT}:
            moved += 1
            late += first > 0
            difference = (result * 255 - expected).abs()
            assert (difference < 1.01).float().mean() > 0.99
            # A centre within 1/256 pixel of the edge may fall on its other side.
            assert (difference > 2.01).any(0).sum() <= 1
    assert exact > 30
    assert moved >= moves
    assert late >= (5 if augment.rand_augment is not None and moves else 0)


@pytest.mark.parametrize("spec", [{"rand_augment": {"probability": 0.0}}, {"color_jitter": {}}])
def test_operations_that_never_come_to_pass_change_nothing(photos: Photos, spec: dict[str, object]) -> None:
    data = photo_batch(photos, 40)
    for crop in ({"crop_padding": 3, "hflip": True}, {}):
        assert torch.equal(augmented(data, **crop, **spec)[0], augmented(data, **crop)[0])
    crop = {"random_resized_crop": {}, "hflip": True}
    difference = (augmented(data, **crop, **spec)[0] - augmented(data, **crop)[0]).abs() * 255
    assert difference.max() <= (0 if spec == {"color_jitter": {}} else 0.5 + 255 / 256)  # one rounding of grey levels


def test_moves_of_a_resized_crop_fill_what_lies_outside_the_crop(photos: Photos) -> None:
    """What a rotation shows around the crop is the fill colour, although the image goes on there."""
    images, labels, indices = photo_batch(photos, 200)
    images = images // 2  # so the fill colour is nowhere in them
    crop = {"scale": [0.2, 0.3]}
    floats, _ = augmented((images, labels, indices), random_resized_crop=crop, trivial_augment=True)
    augment, policy = Augment(trivial_augment=True), trivial_augment(24, 32)
    seen = 0
    for index, result in zip(indices.tolist(), floats, strict=True):
        ((kind, argument),) = plain_operations(augment, policy, index)
        if kind in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
            seen += 1
            filled = (result == torch.tensor([round(255 * mean) for mean in MEAN])[:, None, None] / 255).all(0)
            across = filled if kind == Operation.TRANSLATE_X else filled.T
            width = len(across[0])
            expected = torch.zeros(width, dtype=torch.bool)
            pixels = min(abs(int(argument)), width)
            expected[slice(width - pixels, None) if argument > 0 else slice(0, pixels)] = True
            assert torch.equal(across, expected.expand_as(across))
    assert seen > 15


def test_images_of_another_size_get_moves_of_their_own(photos: Photos) -> None:
    augment = augmenter(rand_augment={"probability": 1.0})
    for size in ((24, 32), (32, 24), (24, 32)):
        data = photo_batch(photos, 30, 3, size)
        fresh, _ = augmented(data, rand_augment={"probability": 1.0})
        assert torch.equal(augment(*data, seed=SEED, epoch=EPOCH)[0], fresh)


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        ({"rand_augment": {}}, "2ccd4ab83c870893"),
        ({"trivial_augment": True}, "9a632109b25536fd"),
        ({"color_jitter": JITTER | {"hue": 0.1}}, "97835ccc255dce22"),
    ],
)
def test_results_stay_what_they_were(spec: dict[str, object], digest: str) -> None:
    """Runs are continued, and teachers' outputs reused, on the strength of this."""
    images = torch.arange(64 * 3 * 16 * 20).mul(2654435761).bitwise_right_shift(9).to(torch.uint8).view(64, 3, 16, 20)
    floats, _ = augmented(
        (images, torch.zeros(64, dtype=torch.int64), torch.arange(64)), crop_padding=2, hflip=True, **spec
    )
    levels = (floats * 255).round().to(torch.uint8)
    assert hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16] == digest


def test_the_whole_augmentation_is_one_graph_for_a_compiler(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)
    data = photo_batch(photos, 16)
    spec = {"random_resized_crop": {}, "hflip": True, "rand_augment": {}, "color_jitter": {"hue": 0.1}}
    spec |= {"random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
    augment = augmenter(**spec)
    compiled = torch.compile(augment._augment, fullgraph=True, dynamic=False, backend="eager")
    expected, _ = augment(*data, seed=SEED, epoch=EPOCH)
    assert torch.equal(compiled(augment._epoch_keys(SEED, EPOCH, 0), *data, True)[0], expected)
