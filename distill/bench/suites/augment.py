"""DeiT's augmentation: a batch at once on the device against timm's transform, image by image on one worker."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from distill.bench import arms
from distill.bench.machine import Machine
from distill.bench.measure import Arm, Row, compare, interleave
from distill.bench.peer import until_drawn
from distill.data.augment import Augmenter


def measure(machine: Machine) -> Iterator[Row]:
    for side, count in ((32, 128), (224, 32)):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        batched, one_by_one = _batched(machine, pixels), _one_by_one(pixels)
        times = interleave([batched, one_by_one], machine.device, repetitions=machine.repetitions, times=2)
        yield compare(f"DeiT's augmentation, {side} px, batch {count}", times, batched, one_by_one, of="speed")


def _batched(machine: Machine, pixels: torch.Tensor) -> Arm:
    mean, std = arms.STATISTICS
    spec = arms.Student(patch_size=4, resolution=pixels.shape[-1]).recipe(augment=arms.DEIT).data.augment
    augmenter = Augmenter(spec, num_classes=arms.NUM_CLASSES, mean=mean, std=std, device=machine.device)
    images, indices = pixels.to(machine.device), torch.arange(len(pixels), device=machine.device)
    labels = torch.zeros_like(indices)
    return Arm("batched on the device", lambda: augmenter(images, labels, indices, seed=0, epoch=0), len(pixels))


def _one_by_one(pixels: torch.Tensor) -> Arm:
    """Without mixup and CutMix, which timm adds where batches are made."""
    mean, std = arms.STATISTICS
    transform = create_transform(
        pixels.shape[-1],
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        mean=mean,
        std=std,
    )
    pictures = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels.permute(0, 2, 3, 1).numpy()]
    return Arm("timm's transform, one core", lambda: [until_drawn(transform, one) for one in pictures], len(pixels))
