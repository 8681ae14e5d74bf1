"""The arm to be compared with: timm's loader and its token distillation task, as timm's train.py puts them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from torch import Tensor, nn
from torch.utils.data import Dataset

import distill.students  # noqa: F401  registers the students with timm
from distill.bench.arms import NUM_CLASSES, STATISTICS, Student


def until_drawn(transform: Callable[[Any], Any], image: Image.Image) -> Any:
    """timm's transform of the image; drawn again where timm 1.0 asks Pillow 13 for 0 bits, which refuses."""
    while True:
        try:
            return transform(image)
        except ValueError:
            continue


class PilImages(Dataset):
    """Images as PIL hands them to timm's transforms, from an array in memory or from files."""

    def __init__(self, images: np.ndarray | list[str], labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform: Any = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.images[index]
        image = Image.open(entry).convert("RGB") if isinstance(entry, str) else Image.fromarray(entry)
        return until_drawn(self.transform, image), int(self.labels[index])


class Peer:
    """One training arm of timm's: `start`, `step` as often as wanted, `stop`."""

    def __init__(
        self, student: Student, teacher: nn.Module, images: PilImages, device: torch.device, *, workers: int
    ) -> None:
        mean, std = STATISTICS
        self.precision, self.device = student.precision, device
        mixup = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
        self.loader = create_loader(
            images,
            input_size=(3, student.resolution, student.resolution),
            batch_size=student.batch_size,
            is_training=True,
            re_prob=0.25,
            re_mode="pixel",
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            mean=mean,
            std=std,
            num_workers=workers,
            collate_fn=mixup,
            device=device,
            persistent_workers=False,
        )
        overlay = {"mean": mean, "std": std}
        self.model = timm.create_model(
            student.model,
            img_size=student.resolution,
            patch_size=student.patch_size,
            num_classes=NUM_CLASSES,
            distilled=True,
            pretrained_cfg_overlay=overlay,
        ).to(device)
        self.task = TokenDistillationTask(
            self.model,
            teacher.to(device),
            criterion=SoftTargetCrossEntropy().to(device),
            distill_type="hard",
            task_loss_weight=0.5,
            device=device,
            verbose=False,
        )
        if student.compile is True:
            self.task.compile()
        self.task.train()
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-3, weight_decay=0.05)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(())

    def start(self, first_steps: int) -> None:
        """Start the loader's processes, and take the steps in which they fill their queue."""
        self.batches = self._endless()
        for _ in range(first_steps):
            self.step()

    def stop(self) -> None:
        """End the loader's processes."""
        self.batches = iter(())

    def step(self) -> None:
        images, targets = next(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.task(images, targets)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader
