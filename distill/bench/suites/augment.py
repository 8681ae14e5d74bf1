"""DeiT's augmentation: a batch at once on the device against timm's transform, image by image on one worker."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.data import create_transform

from distill.bench import arms
from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.peer import AUGMENTATION, PilImages
from distill.data.augment import Augmenter


def measure(machine: Machine) -> Iterator[Row]:
    for side, count in ((32, 128), (224, 32)):
        name = f"DeiT's augmentation, {side} px, batch {count}"
        if not machine.wants(name):
            continue
        pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        batched, one_by_one = _batched(machine.device, pixels), _one_by_one(pixels)
        times = machine.interleave([batched, one_by_one])
        yield compare(name, times, batched, one_by_one, of="speed")


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
