"""The rules by which `distill init` chooses the values of a recipe: functions of a few facts, without torch.

docs/reference/init.md states them, with the reasons; tests/test_init_rules.py compares both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from distill.errors import InputError

Goal = Literal["small", "accurate", "fast"]
GOALS: tuple[Goal, ...] = get_args(Goal)


class Images(NamedTuple):
    """What a folder of images holds."""

    counts: Mapping[str, int]
    """Training images of each class, before any are held out."""
    validation: int | None
    """Images of the validation split; None: there is no such folder."""
    test: int | None
    side: int
    """Median of the images' shorter sides, in pixels."""
    stretch: float
    """Median of longer over shorter side."""
    grey: bool
    """Whether all images are greyscale."""

    @property
    def train(self) -> int:
        return sum(self.counts.values())


class Budget(NamedTuple):
    """Of training, by goal and device."""

    seen: int
    """Images that the student sees over the run."""
    fewest: int
    """Epochs at least."""
    most: int
    largest: int
    """Resolution in pixels at most."""
    grids: tuple[int, ...]
    """Patches along a side of the student's grid."""


BUDGETS: dict[tuple[Goal, bool], Budget] = {
    ("small", False): Budget(100_000, 12, 200, 64, (8,)),
    ("accurate", False): Budget(200_000, 20, 300, 96, (8, 12)),
    ("fast", False): Budget(50_000, 6, 100, 64, (8,)),
    ("small", True): Budget(3_000_000, 30, 300, 128, (8,)),
    ("accurate", True): Budget(6_000_000, 60, 300, 224, (8, 12, 14)),
    ("fast", True): Budget(1_000_000, 15, 100, 64, (8,)),
}
"""By goal, and whether there is a GPU."""
PATCHES = (4, 8, 16)
"""Sides in pixels: powers of 2, for the convolutional stem."""
SMALL_BUDGET = 2_000_000
"""Images seen, up to which Muon and plain augmentation are chosen."""
LARGE_SET = 20_000
"""Images from which smaller shares are held out."""
LARGEST_SHARE = 0.25
"""That is held out so that each class has an image in it."""
LEAST = {1: 4, 2: 5}
"""Images of the smallest class that one and two holdouts need."""


def budget(goal: Goal, *, gpu: bool) -> Budget:
    return BUDGETS[goal, gpu]


def resolution_and_patch(side: int, goal: Goal, *, gpu: bool) -> tuple[int, int]:
    """Both in pixels: the largest product of a grid and a patch that neither the images nor the budget are smaller
    than, at least 32.
    """
    chosen = budget(goal, gpu=gpu)
    most = min(max(side, 32), chosen.largest)
    return max((grid * patch, patch) for grid in chosen.grids for patch in PATCHES if grid * patch <= most)


def student(images: int, goal: Goal, *, gpu: bool) -> str:
    """The model, by the number of training images."""
    if goal != "accurate":
        return "vit_nano"
    if not gpu or images < 10_000:
        return "vit_micro"
    return "vit_tiny" if images < 200_000 else "vit_small"


def teacher(resolution: int) -> str:
    """The CNN to train where no teacher is given. A ResNet-18 halves its images five times: of small ones nothing would
    be left.
    """
    return "resnet18" if resolution >= 64 else "cifar_resnet20"


def epochs(images: int, goal: Goal, *, gpu: bool) -> int:
    chosen = budget(goal, gpu=gpu)
    return min(max(round(chosen.seen / images), chosen.fewest), chosen.most)


def batch_size(images: int, *, gpu: bool) -> int:
    """A power of 2 of which an epoch has 40 or more, from 16 to 128 (512 on a GPU); less for fewer than 16 images."""
    most = min(max(images // 40, min(images, 16)), 512 if gpu else 128)
    return 2 ** int(math.log2(most))


def holdouts(images: Images) -> dict[str, float]:
    """`data.test` and `data.validation`, as far as there are no folders for them.

    Raises:
        InputError: a class has too few images for that.
    """
    wanted = [key for key, size in (("test", images.test), ("validation", images.validation)) if size is None]
    if not wanted:
        return {}
    name, smallest = min(images.counts.items(), key=lambda item: item[1])
    if smallest < LEAST[len(wanted)]:
        raise InputError(
            f"class '{name}' has {smallest} image(s); {LEAST[len(wanted)]} or more of each class are needed to hold "
            f"some out for {' and '.join(wanted)}. Add images of it, take it away, or bring folders of your own: "
            "DIR/train/CLASS, DIR/val/CLASS, DIR/test/CLASS."
        )
    usual = {"test": 0.2, "validation": 0.1} if images.train < LARGE_SET else {"test": 0.1, "validation": 0.02}
    found: dict[str, float] = {}
    for key in wanted:
        found[key] = max(usual[key], min(math.ceil(100 / smallest) / 100, LARGEST_SHARE))
        smallest -= int(found[key] * smallest)
    return found


def trained_on(images: Images) -> int:
    """Training images that are left."""
    left = float(images.train)
    for share in holdouts(images).values():
        left -= round(left * share)
    return int(left)


def augmentation(resolution: int, *, grey: bool, seen: int, epochs: int) -> dict[str, Any]:
    """`data.augment`. Greyscale images, such as letters and X-rays, are not mirrored."""
    found: dict[str, Any] = {"hflip": not grey}
    if resolution < 64:
        found["crop_padding"] = resolution // 8
    else:
        found["random_resized_crop"] = {"scale": [0.4, 1.0]}
    if seen > SMALL_BUDGET:
        found |= {"rand_augment": {}, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
        found["mix_off_epoch"] = epochs * 9 // 10
    return found


def fit(stretch: float) -> str:
    """`data.fit`: centre crops, unless they would cut off a third or more of half of the images."""
    return "crop" if stretch < 1.5 else "pad"


def optimizer(seen: int, epochs: int) -> dict[str, Any]:
    """`optim` of the student: Muon for small budgets, AdamW for long runs."""
    if seen <= SMALL_BUDGET:
        found: dict[str, Any] = {"name": "nmuon", "lr": 3e-3, "momentum": 0.95}
    else:
        found = {"name": "adamw", "lr": 1e-3, "min_lr": 1e-5}
    return found | {"weight_decay": 0.05, "warmup_epochs": min(10, max(1, epochs // 20))}


def ema(steps: int) -> float:
    """`train.ema`: a moving average over some twentieth of the run, at most over 1,000 steps."""
    return round(1 - 1 / min(1000, max(20, steps // 20)), 4)


def methods(*, logits: bool, maps: bool) -> list[dict[str, Any]]:
    """`distill`, by what the teacher has: guidance by its feature maps, and beside it its decisions, which teach the
    distillation token; softened logits where there are no maps.
    """
    guide = {"method": "guide", "weight": {"start": 2.5, "end": 0.0, "until": 0.7}}
    if not maps:
        return [{"method": "soft", "weight": 0.5, "temperature": 2.0}] if logits else []
    return [{"method": "hard", "weight": 0.5}, guide] if logits else [guide]
