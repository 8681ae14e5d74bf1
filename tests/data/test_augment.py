"""Each augmentation against torchvision's functional form or a slow oracle, sample by sample.

The oracles take the hashes of a sample from `randomness` (tested by itself) and do the rest in plain Python.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from distill.data import geometry, mixing, rows
from distill.data import randomness as rnd
from distill.data.augment import Augmenter
from distill.recipe import Augment

SEED, EPOCH, CLASSES = 11, 4, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CPU = torch.device("cpu")


def batch(count: int = 48, channels: int = 3, height: int = 16, width: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images, labels, torch.randperm(10_000, generator=generator)[:count]


def augmenter(channels: int = 3, **spec: object) -> Augmenter:
    return Augmenter(Augment(**spec), num_classes=CLASSES, mean=MEAN[:channels], std=STD[:channels], device=CPU)


def augmented(data: tuple[Tensor, Tensor, Tensor], **spec: object) -> tuple[Tensor, Tensor]:
    return augmenter(data[0].shape[1], **spec)(*data, seed=SEED, epoch=EPOCH)


def draw(name: str, index: int) -> int:
    return int(rnd.hashes(rnd.keys(SEED, EPOCH, [name]), torch.tensor([index]))[0, 0])


def share(name: str, index: int) -> float:
    return (draw(name, index) >> 8) / 2**24


def below(name: str, index: int, bound: int) -> int:
    return draw(name, index) * bound >> 32


def test_without_augmentation_images_are_scaled_and_targets_one_hot() -> None:
    images, labels, _ = data = batch(channels=1)
    floats, targets = augmented(data)
    assert floats.dtype == targets.dtype == torch.float32
    assert torch.equal(floats, tv.to_dtype(images, torch.float64, scale=True).float())
    assert torch.equal(targets, torch.eye(CLASSES)[labels])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_crop_and_flip_are_torchvisions(padding: int, flip: bool) -> None:
    images, _, indices = data = batch()
    floats, _ = augmented(data, crop_padding=padding, hflip=flip)
    seen = set()
    for image, index, result in zip(images, indices.tolist(), floats, strict=True):
        top, left = (below(f"crop/{axis}", index, 2 * padding + 1) for axis in "yx")
        expected = tv.crop(tv.pad(image, [padding] * 4), top, left, 16, 20)
        mirrored = flip and share("flip", index) < 0.5
        if mirrored:
            expected = tv.horizontal_flip(expected)
        assert torch.equal(result, expected.float() / 255)
        seen.add((top, left, mirrored))
    assert len(seen) > (10 if padding else 1 if flip else 0)


def plain_box(
    group: str, index: int, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], gap: int
):
    """Top, left, height, width as a loop over attempts; None where none fits."""
    for attempt in range(10):
        pixels = (area[0] + share(f"{group}/area{attempt}", index) * (area[1] - area[0])) * height * width
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + share(f"{group}/ratio{attempt}", index) * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width - gap and 0 < h <= height - gap:
            return below(f"{group}/top", index, height - h + 1), below(f"{group}/left", index, width - w + 1), h, w
    return None


@pytest.mark.parametrize("flip", [False, True])
def test_random_resized_crop_is_torchvisions(flip: bool) -> None:
    images, _, indices = data = batch()
    floats, _ = augmented(data, random_resized_crop={"scale": [0.08, 1.0], "ratio": [0.75, 1.5]}, hflip=flip)
    for image, index, result in zip(images, indices.tolist(), floats, strict=True):
        box = plain_box("resized-crop", index, 16, 20, (0.08, 1.0), (0.75, 1.5), 0)
        assert box is not None
        expected = tv.resized_crop(image.double() / 255, *box, size=[16, 20], antialias=True)
        if flip and share("flip", index) < 0.5:
            expected = tv.horizontal_flip(expected)
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((10, 40), (0.5, 2.0), (0, 10, 10, 20)),  # too wide: the largest central box of ratio 2
        ((40, 10), (0.5, 2.0), (10, 0, 20, 10)),
        ((10, 12), (1.0, 2.0), (0, 0, 10, 12)),  # nothing wrong with the ratio: the whole image
    ],
)
def test_random_resized_crop_falls_back_to_the_centre(size, ratio, expected) -> None:
    hashed = rnd.hashes(rnd.keys(0, 0, geometry.RESIZED_CROP_DRAWS), torch.arange(20))
    # No box of twice the image's area fits.
    boxes = geometry.crop_boxes(hashed, *size, scale=(2.0, 2.0), ratio=ratio)
    assert {tuple(int(side[row]) for side in boxes) for row in range(20)} == {expected}


def test_random_resized_crop_has_torchvisions_distribution() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    reference = RandomResizedCrop(32)
    image = torch.zeros(1, 24, 32)
    theirs = np.array([list(reference.make_params([image]).values()) for _ in range(3000)])
    hashed = rnd.hashes(rnd.keys(0, 0, geometry.RESIZED_CROP_DRAWS), torch.arange(3000))
    ours = torch.stack(geometry.crop_boxes(hashed, 24, 32, (0.08, 1.0), (3 / 4, 4 / 3)), 1).numpy()
    for column in range(4):
        assert stats.ks_2samp(theirs[:, column], ours[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_random_erasing_overwrites_a_box_with_noise(channels: int) -> None:
    images, _, indices = data = batch(channels=channels)
    floats, _ = augmented(data, random_erasing=0.6)
    quantiles = stats.norm.ppf((np.arange(1024) + 0.5) / 1024)
    erased = 0
    for image, index, result in zip(images, indices.tolist(), floats, strict=True):
        expected = image.double() / 255
        box = plain_box("erase", index, 16, 20, (0.02, 1 / 3), (0.3, 1 / 0.3), 1)
        if share("erase/whether", index) < 0.6 and box is not None:
            erased += 1
            top, left, height, width = box
            for y in range(top, top + height):
                for x in range(left, left + width):
                    word = (draw("erase/noise", index) + (y * 20 + x) * 0x9E3779B9) % 2**32
                    word = int(rnd.mix(torch.tensor(word)))
                    for channel in range(channels):
                        noise = MEAN[channel] + STD[channel] * quantiles[word >> 10 * channel & 1023]
                        expected[channel, y, x] = min(max(noise, 0.0), 1.0)
        torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=0)
    assert 10 < erased < 45


def test_erased_pixels_are_normal_after_normalisation() -> None:
    erasing = augmenter(random_erasing=1.0)
    erasing._prepare_noise(3, 32, 32)
    normal = erasing._pixels(torch.arange(64) * 7919, torch.Size((64, 3, 32, 32)))
    values = [((normal[:, channel] - MEAN[channel]) / STD[channel]).flatten().numpy() for channel in range(3)]
    for channel, value in enumerate(values):
        inside = (value > -MEAN[channel] / STD[channel] + 1e-3) & (value < (1 - MEAN[channel]) / STD[channel] - 1e-3)
        low, high = stats.norm.cdf([-MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel]])
        assert abs(inside.mean() - (high - low)) < 0.01
        expected = stats.truncnorm(-MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel])
        assert stats.kstest(value[inside], expected.cdf).statistic < 0.015
    assert abs(np.corrcoef(values)[0, 1]) < 0.02


def test_erasing_has_timms_boxes() -> None:
    import random

    from timm.data.random_erasing import RandomErasing

    random.seed(0)
    timms = RandomErasing(probability=1.0, mode="const", device="cpu")
    theirs = [int((timms(torch.ones(1, 32, 32)) == 0).sum()) for _ in range(2000)]
    hashed = rnd.hashes(rnd.keys(0, 0, geometry.RESIZED_CROP_DRAWS), torch.arange(2000))
    boxes, found = geometry.random_boxes(hashed, 32, 32, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), smaller_by=1)
    ours = boxes.height * boxes.width * found
    assert stats.ks_2samp(theirs, ours.numpy()).pvalue > 1e-3


def plain_mix(data: tuple[Tensor, Tensor, Tensor], mixup: float, cutmix: float, probability: float, switch: float):
    images, labels, indices = data
    count, _, height, width = images.shape
    floats, one_hot = images.double() / 255, torch.eye(CLASSES, dtype=torch.float64)[labels]
    results, targets, kinds = floats.clone(), one_hot.clone(), []
    for k in range(0, count, 2):
        first = int(indices[k])
        if share("mix/whether", first) >= probability:
            kinds.append("none")
            continue
        use_cutmix = bool(cutmix) and (not mixup or share("mix/switch", first) < switch)
        kinds.append("cutmix" if use_cutmix else "mixup")
        if use_cutmix:
            lam = float(rnd.beta_table(cutmix)[draw("cutmix/lambda", first) >> 20])
            half_height, half_width = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
            y, x = below("cutmix/y", first, height), below("cutmix/x", first, width)
            rows = slice(max(y - half_height, 0), min(y + half_height, height))
            columns = slice(max(x - half_width, 0), min(x + half_width, width))
        for own, partner in ((k, k + 1), (k + 1, k)):
            if use_cutmix:
                results[own, :, rows, columns] = floats[partner, :, rows, columns]
                lam = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
            else:
                lam = float(rnd.beta_table(mixup)[draw("mixup/lambda", int(indices[own])) >> 20])
                results[own] = lam * floats[own] + (1 - lam) * floats[partner]
            targets[own] = lam * one_hot[own] + (1 - lam) * one_hot[partner]
    return results, targets, kinds


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ({"mixup": 0.8}, {"mixup"}),
        ({"cutmix": 1.0}, {"cutmix"}),
        ({"mixup": 0.2, "cutmix": 0.5, "mix_probability": 0.7, "mix_switch": 0.4}, {"none", "mixup", "cutmix"}),
    ],
)
def test_mixing_is_that_of_a_loop_over_pairs(spec: dict[str, float], kinds: set[str]) -> None:
    data = batch(count=64)
    floats, targets = augmented(data, **spec)
    results, expected, seen = plain_mix(
        data, spec.get("mixup", 0), spec.get("cutmix", 0), spec.get("mix_probability", 1.0), spec.get("mix_switch", 0.5)
    )
    torch.testing.assert_close(floats.double(), results, atol=2e-6, rtol=0)
    torch.testing.assert_close(targets.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert set(seen) == kinds


def test_cutmix_boxes_have_their_area_in_the_middle_and_are_clipped_at_the_edge() -> None:
    boxes = mixing.cutmix_boxes(
        torch.tensor([0.25, 0.25, 1.0, 0.0]), torch.tensor([16, 0, 16, 3]), torch.tensor([16, 31, 16, 3]), 32, 32
    )
    assert [tuple(int(side[row]) for side in boxes) for row in range(4)] == [
        (8, 8, 16, 16),
        (0, 23, 8, 9),
        (0, 0, 32, 32),
        (3, 3, 0, 0),
    ]


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
FULL = {
    "crop_padding": 2,
    "hflip": True,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}
RESIZED = {"crop_padding": 0, "random_resized_crop": {}}
EACH_CROP_AND_POLICY = pytest.mark.parametrize(
    "crop",
    [
        {},
        RESIZED,
        {"rand_augment": {}, "color_jitter": JITTER},
        {"trivial_augment": True},
        RESIZED | {"rand_augment": {}},
        RESIZED | {"color_jitter": {"hue": 0.5}},
    ],
)


@pytest.mark.parametrize(("off", "mixed"), [(0, True), (EPOCH + 1, True), (EPOCH, False), (1, False)])
def test_mixing_ends_with_an_epoch_and_nothing_else_does(off: int, mixed: bool) -> None:
    data = batch()
    floats, targets = augmented(data, **FULL, mix_off_epoch=off)
    same = augmented(data, **(FULL if mixed else FULL | {"mixup": 0.0, "cutmix": 0.0}))
    assert torch.equal(floats, same[0])
    assert torch.equal(targets, same[1])
    assert (targets.amax(1) < 1).any() == mixed


@EACH_CROP_AND_POLICY
def test_a_sample_does_not_depend_on_the_batch_around_it(crop: dict[str, object]) -> None:
    images, labels, indices = data = batch()
    whole, targets = augmented(data, **(FULL | crop))
    augment = augmenter(**(FULL | crop))
    for part in (slice(0, 2), slice(10, 24), slice(24, 48)):
        some, some_targets = augment(images[part], labels[part], indices[part], seed=SEED, epoch=EPOCH)
        assert torch.equal(some, whole[part])
        assert torch.equal(some_targets, targets[part])
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_epochs_and_seeds_differ() -> None:
    data = batch()
    augment = augmenter(**FULL)
    first, _ = augment(*data, seed=0, epoch=0)
    assert not torch.equal(first, augment(*data, seed=0, epoch=1)[0])
    assert not torch.equal(first, augment(*data, seed=1, epoch=0)[0])
    assert torch.equal(first, augment(*data, seed=0, epoch=0)[0])


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    augmented(batch(), **FULL)
    assert torch.equal(state, torch.get_rng_state())


@EACH_CROP_AND_POLICY
@pytest.mark.parametrize("channels", [1, 3])
def test_the_form_for_devices_that_must_not_wait_gives_the_same(
    crop: dict[str, object], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch(64, channels, 17, 23)
    copy = data[0].clone()
    picked, _ = augmented(data, **(FULL | crop))
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)
    assert torch.equal(augmented(data, **(FULL | crop))[0], picked)
    monkeypatch.setattr(rows, "DEVICE_PART", 20 * 3 * 17 * 23)
    assert torch.equal(augmented(data, **(FULL | crop))[0], picked)
    assert torch.equal(data[0], copy)  # what came in is left as it was
