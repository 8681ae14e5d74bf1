"""The arm to be compared with: timm's loader and its token distillation task, as timm's train.py puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
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
from distill.bench.arms import MEAN, NUM_CLASSES, STD, Student

AUGMENTATION: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "mean": MEAN,
    "std": STD,
}
"""DeiT's, but for mixup and CutMix, which timm adds where batches are made."""


class PilImages(Dataset):
    """Images as PIL hands them to timm's transforms, from an array in memory or from files."""

    def __init__(self, images: np.ndarray | list[str]) -> None:
        self.images = images
        self.transform: Any = None  # set by timm's create_loader, too

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.images[index]
        image = Image.open(entry).convert("RGB") if isinstance(entry, str) else Image.fromarray(entry)
        while True:
            with suppress(ValueError):  # drawn again where timm 1.0 asks Pillow 13 for 0 bits, which refuses
                return self.transform(image), 0


class Peer:
    """A student of timm's in training."""

    def __init__(
        self, student: Student, teacher: nn.Module, images: PilImages, device: torch.device, *, workers: int
    ) -> None:
        self.precision, self.device = student.precision, device
        mixup = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
        self.loader = create_loader(
            images,
            input_size=(3, student.resolution, student.resolution),
            batch_size=student.batch_size,
            is_training=True,
            num_workers=workers,
            collate_fn=mixup,
            device=device,
            persistent_workers=False,
            **AUGMENTATION,
        )
        self.model = timm.create_model(
            student.model,
            img_size=student.resolution,
            patch_size=student.patch_size,
            num_classes=NUM_CLASSES,
            distilled=True,
            pretrained_cfg_overlay={"mean": MEAN, "std": STD},
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

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch after epoch; the loader's processes end with the iterator."""
        while True:
            yield from self.loader

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.task(*batch)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
