"""Which methods compare the samples of a micro-batch, so that its size changes what they are: as they declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill import registry
from distill.data import Batch
from distill.teaching.source import StepIndex
from distill.trainer import Trainer
from tests.conftest import Toy
from tests.test_self_distillation import VIEWS
from tests.test_step_speed import batches_of, toy_recipe, trainer_of


def _loss(trainer: Trainer, batch: Batch, method: str) -> float:
    with torch.no_grad():
        return float(trainer.task(batch, StepIndex(0, 0), 0.0).parts[method])


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in registry.names("methods")), ("fitnet", {"projection": "orthogonal"})],
)
def test_a_method_compares_samples_if_and_only_if_it_says_so(toy: Toy, method: str, options: dict[str, Any]) -> None:
    """The loss of the others is the mean of that of the samples."""
    data: dict[str, Any] = {"augment": {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0}}
    more: dict[str, Any] = {}
    if registry.find("methods", method).options.model_validate({}).needs.average:
        data, more = {"augment": {}, "views": VIEWS}, {"teacher": {"ema": {}}}
    recipe = toy_recipe(
        toy,
        distill=[{"method": method, "weight": 1.0, **options}],
        data=data,
        student={"drop_path": 0.0},
        train={"gradient_accumulation": 1, "compile": False, "ema": None},
        **more,
    )
    trainer = trainer_of(recipe)
    (batch,) = next(batches_of(trainer))

    def part(start: int, stop: int) -> Batch:
        of = slice(start, stop)
        views = tuple(view[of] for view in batch.views)
        return batch._replace(
            images=batch.images[of], targets=batch.targets[of], indices=batch.indices[of], views=views
        )

    whole, parts = _loss(trainer, part(0, 8), method), [part(0, 4), part(4, 8)]
    mean = sum(_loss(trainer, each, method) for each in parts) / 2
    differs = abs(whole - mean) > 1e-5 * max(1.0, abs(whole))
    assert differs == recipe.distill[0].needs.compares_samples
