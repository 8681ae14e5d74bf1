"""What a run will cost on this machine, by some of its steps."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch

from distill.data.dataset import Dataset
from distill.data.opening import RESIDENT_LIMIT
from distill.dry_run import peak_memory
from distill.launching.processes import build_accelerator, with_precision
from distill.out_of_memory import advising
from distill.recipe import Recipe
from distill.trainer import Trainer
from teachers import Teacher

SECONDS = 4.0
"""After which no further step is measured."""
MOST = 10
"""Steps."""
EVALUATION = 2 / 3
"""Cost of evaluating an image, raw and averaged weights, over that of training on it: forward passes alone."""


class Estimate(NamedTuple):
    minutes: float
    mebibytes: float
    steps: int
    """That were measured."""


def estimate(recipe: Recipe, dataset: Dataset, teacher: Teacher | None, *, images: int, evaluated: int) -> Estimate:
    """Time and memory of training, from a few steps on a sample.

    Args:
        dataset: the sample.
        images: of the training split.
        evaluated: of the split that is evaluated after each epoch.
    """
    recipe = with_precision(recipe)
    recipe = recipe.replace(train=recipe.train.model_copy(update={"compile": False}))  # which takes a minute
    log = logging.getLogger("distill")
    level = log.level
    log.setLevel(logging.ERROR)  # a run says the rest
    try:
        accelerator = build_accelerator(recipe.train, Path())
        trainer = Trainer(recipe, accelerator, dataset, teacher)
    finally:
        log.setLevel(level)
    trainer.model.train()
    times: list[float] = []
    began = time.monotonic()
    with advising(recipe, trainer.plan, dataset.augmenter.paired):
        epoch = 0
        while len(times) < 2 or (time.monotonic() - began < SECONDS and len(times) < MOST):
            start = time.monotonic()
            trainer.train_step(next(trainer.dataset.training_batches(trainer.plan, epoch, 0)))
            trainer.read_skipped()  # waits for the device
            times.append(time.monotonic() - start)
            epoch += 1
    seconds = sorted(times[1:])[(len(times) - 1) // 2]  # without the first, which allocates
    per_image = seconds / recipe.train.batch_size
    a_epoch = images // recipe.train.batch_size * seconds + EVALUATION * per_image * evaluated
    pixels = dataset.info.channels * recipe.data.resolution**2
    left = max(0, images + evaluated - sum(dataset.info.sizes.values())) * pixels
    streamed = (images + evaluated) * 3 * recipe.data.resolution**2 > RESIDENT_LIMIT
    total = peak_memory(accelerator.device) + (0 if streamed else left)
    accelerator.free_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return Estimate(recipe.train.epochs * a_epoch / 60, total / 2**20, len(times) - 1)
