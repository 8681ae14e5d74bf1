"""Learning rate and parameter groups."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler

from distill.errors import InputError
from distill.optim import build_optimizer, learning_rate, set_learning_rate
from distill.recipe.schema import Optim


def rates(spec: Optim, steps_per_epoch: int, epochs: int, steps: int | None = None) -> list[float]:
    total = steps_per_epoch * epochs
    return [
        learning_rate(spec, step, steps_per_epoch=steps_per_epoch, total_steps=total) for step in range(steps or total)
    ]


def test_the_cosine_part_is_timms() -> None:
    spec = Optim(lr=0.1, min_lr=0.01, warmup_epochs=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = CosineLRScheduler(torch.optim.SGD([parameter], lr=0.1), t_initial=40, lr_min=0.01, t_in_epochs=False)
    assert rates(spec, 10, 4) == pytest.approx([reference._get_lr(step)[0] for step in range(40)], abs=1e-12)


def test_warm_up_rises_evenly_and_meets_the_peak() -> None:
    values = rates(Optim(lr=1.0, warmup_epochs=2), 10, 10)
    warm = values[:20]
    assert [b - a for a, b in itertools.pairwise(warm)] == pytest.approx([1 / 21] * 19)
    assert 0 < warm[0] < 0.05
    assert values[20] == max(values) == 1.0
    assert values[-1] < 0.01


def test_constant_stays_and_a_long_warm_up_is_allowed() -> None:
    assert set(rates(Optim(lr=0.3, warmup_epochs=0, schedule="constant"), 5, 3)) == {0.3}
    values = rates(Optim(lr=1.0, warmup_epochs=50), 10, 2)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(20 / 501)
    assert math.isfinite(learning_rate(Optim(), 10**6, steps_per_epoch=1, total_steps=5))


def test_decay_falls_on_matrices_only_and_layer_decay_scales() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, embed_dim=24, num_heads=2)
    optimizer = build_optimizer(Optim(weight_decay=0.05, layer_decay=0.5), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and name not in {"cls_token", "pos_embed"}), name
            scales[name] = group["lr_scale"]
    assert len(scales) == len(names)
    assert scales["blocks.0.attn.qkv.weight"] * 2 == pytest.approx(scales["blocks.1.attn.qkv.weight"])
    assert scales["head.weight"] == 1.0
    set_learning_rate(optimizer, 0.2)
    assert all(group["lr"] == pytest.approx(0.2 * group["lr_scale"]) for group in optimizer.param_groups)


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"optim\.name.*'adamww'"):
        build_optimizer(Optim(name="adamww"), torch.nn.Linear(2, 2))
