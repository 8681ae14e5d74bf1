"""Does it cost accuracy to put all moves of an image into one resampling, in the place of the last? A nano student,
patch 8, learns CIFAR-10 twice from each seed: the same weights, order, and draws of crop, flip and RandAugment,

    batched       carried out as distill does it,
    one_by_one    image by image with torchvision on PIL images, each operation in its turn with its own resampling.

    python -m results.augmentation.paired_run --root data --epochs 4 --seeds 0 1

(in the project's folder) writes paired_run.json beside this file: top-1 on the test set, in percent. Seeds that are
there already are not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distill.data import BatchPlan, Dataset, open_dataset
from distill.data.policies import Operation, Operations
from distill.data.randomness import hashes, integers, keys, uniform
from distill.features import mean_over_heads
from distill.recipe import Recipe, from_mapping
from distill.students import build_student
from distill.teaching.source import StepIndex
from distill.training.optim import build_optimizer, learning_rate, set_learning_rate
from distill.training.task import build_task
from results.augmentation import one_by_one

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    "data": {"validation": 0, "augment": {"crop_padding": 4, "hflip": True, "rand_augment": {}}},
    "student": {"model": "vit_nano", "patch_size": 8},
    "optim": {"lr": 1.0e-3, "weight_decay": 0.05, "warmup_epochs": 1},
    "train": {"batch_size": 128},
}


class OneByOne:
    """In the place of a dataset's augmenter, with its draws."""

    paired = False

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.spec, self.classes = recipe.data.augment, dataset.info.num_classes
        self.fill = [round(255 * channel) for channel in dataset.info.mean]
        self.operations = Operations(self.spec, CPU)

    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor, *, seed: int, epoch: int):
        hashed = hashes(keys(seed, epoch, ["crop/y", "crop/x", "flip", *self.operations.draws]), indices)
        starts = integers(hashed[:2], 2 * self.spec.crop_padding + 1) - self.spec.crop_padding
        flips = uniform(hashed[2]) < 0.5
        self.operations.prepare(*images.shape[2:])
        layers, _, _ = self.operations.draw(hashed[3:])
        results = []
        for row, image in enumerate(images):
            drawn = [(Operation(int(layer.operation[row])), float(layer.argument[row])) for layer in layers]
            top, left, flip = int(starts[0, row]), int(starts[1, row]), bool(flips[row])
            results.append(one_by_one.augment(image, top=top, left=left, flip=flip, operations=drawn, fill=self.fill))
        return torch.stack(results).float() / 255, one_hot(labels, self.classes).float()


def right_answers(recipe: Recipe, seed: int, arm: str, epochs: int, max_steps: int | None) -> Tensor:
    """Train, then bool [test images]: which of them the student gets right."""
    dataset = open_dataset(recipe.data, seed=0, device=CPU)
    if arm == "one_by_one":
        dataset.augmenter = OneByOne(recipe, dataset)
    info = dataset.info
    described = {"num_classes": info.num_classes, "channels": info.channels, "mean": info.mean, "std": info.std}
    student = build_student(recipe.student, resolution=recipe.data.resolution, seed=seed, **described).train()
    task = build_task(recipe, student, None, num_classes=info.num_classes)
    optimizer = build_optimizer(recipe.optim, student.model)
    plan = BatchPlan(seed, recipe.train.batch_size)
    in_epoch = plan.steps_per_epoch(info.sizes["train"])
    total = max_steps or epochs * in_epoch
    batches = (batch for epoch in range(epochs) for (batch,) in dataset.training_batches(plan, epoch))
    for step, batch in zip(range(total), batches, strict=False):
        set_learning_rate(optimizer, learning_rate(recipe.optim, step, steps_per_epoch=in_epoch, total_steps=total))
        losses = task(batch, StepIndex(step, 0), step / total)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    student.eval()
    with torch.inference_mode():
        test = dataset.evaluation_batches("test", 0, info.sizes["test"], 500)
        return torch.cat([mean_over_heads(student.logits(images)).argmax(1) == labels for images, labels in test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-steps", type=int, help="ends each training early, for a rehearsal")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("paired_run.json"))
    asked = parser.parse_args()
    recipe = from_mapping(RECIPE, [f"data.root={asked.root}"])
    report = {"recipe": RECIPE, "epochs": asked.epochs, "max_steps": asked.max_steps, "torch": torch.__version__}
    earlier = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    runs = earlier["runs"] if report.items() <= earlier.items() else []
    for seed in sorted({*asked.seeds} - {run["seed"] for run in runs}):
        arms = ("batched", "one_by_one")
        right = {arm: right_answers(recipe, seed, arm, asked.epochs, asked.max_steps) for arm in arms}
        top1 = {arm: round(100 * answers.float().mean().item(), 2) for arm, answers in right.items()}
        only = {f"only_{arm}_right": int((right[arm] & ~right[other]).sum()) for arm, other in (arms, arms[::-1])}
        runs.append({"seed": seed, **top1, **only, "difference": round(top1["batched"] - top1["one_by_one"], 2)})
        print(runs[-1], flush=True)
        summary = {"runs": runs, "mean_difference": round(mean(run["difference"] for run in runs), 3)}
        asked.out.write_text(json.dumps(report | summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
