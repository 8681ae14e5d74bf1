"""Augmentation of a batch at once on the device, against image by image on one worker: DeiT's by timm's transform,
DINO's views by torchvision's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.peer import AUGMENTATION, PilImages
from distill.data.augment import Augmenter
from distill.data.views import MultiCrop
from distill.recipe.views import View

DINO = (
    View(kind="global", size=32),
    View(kind="global", size=32, blur=0.1, solarize=0.2),
    View(kind="local", size=16, count=8),
)


def measure(machine: Machine) -> Iterator[Row]:
    for side, count in ((32, 128), (224, 32)):
        name = f"DeiT's augmentation, {side} px, batch {count}"
        if machine.wants(name):
            pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
            yield _compared(machine, name, _batched(machine.device, pixels), _one_by_one(pixels))
    name = "DINO's views, 2 x 32 and 8 x 16 px, batch 128"
    if machine.wants(name):
        pixels = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8)
        yield _compared(machine, name, _batched_views(machine.device, pixels), _views_one_by_one(pixels))


def _compared(machine: Machine, name: str, batched: Arm, one_by_one: Arm) -> Row:
    return compare(name, machine.interleave([batched, one_by_one]), batched, one_by_one, of="speed")


def _batched(device: torch.device, pixels: torch.Tensor) -> Arm:
    spec = arms.Student(resolution=pixels.shape[-1]).recipe(data={"augment": arms.DEIT}).data.augment
    augmenter = Augmenter(spec, num_classes=arms.NUM_CLASSES, mean=arms.MEAN, std=arms.STD, device=device)
    images, indices = pixels.to(device), torch.arange(len(pixels), device=device)
    labels = torch.zeros_like(indices)
    return Arm("batched on the device", lambda: augmenter(images, labels, indices, seed=0, epoch=0), len(pixels))


def _one_by_one(pixels: torch.Tensor) -> Arm:
    """Without mixup and CutMix."""
    images = PilImages(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    images.transform = create_transform(pixels.shape[-1], is_training=True, **AUGMENTATION)
    return Arm("timm's transform, one core", lambda: [images[index] for index in range(len(images))], len(images))


def _batched_views(device: torch.device, pixels: torch.Tensor) -> Arm:
    multi_crop, views = MultiCrop(DINO, device), sum(group.count for group in DINO)
    images, indices = pixels.to(device), torch.arange(len(pixels), device=device)
    return Arm(
        "batched on the device", lambda: multi_crop([images], indices, seed=0, epoch=0, views=views), len(pixels)
    )


def _views_one_by_one(pixels: torch.Tensor) -> Arm:
    images = PilImages(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    transforms = list(chain.from_iterable([_transform(group)] * group.count for group in DINO))
    images.transform = lambda image: [transform(image) for transform in transforms]
    return Arm("torchvision's, one core", lambda: [images[index] for index in range(len(images))], len(images))


def _transform(group: View) -> transforms.Compose:
    """A view of the group as in DINO's code, with torchvision's blur."""
    assert group.color_jitter is not None
    jitter = transforms.ColorJitter(**dict(group.color_jitter))
    blur = transforms.GaussianBlur(2 * min(8, group.size - 1) + 1, tuple(group.blur_sigma))
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(group.size, group.scale, group.ratio, InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], group.jitter_probability),
            transforms.RandomGrayscale(group.grey),
            transforms.RandomApply([blur], group.blur),
            transforms.RandomSolarize(128, group.solarize),
            transforms.PILToTensor(),
        ]
    )
