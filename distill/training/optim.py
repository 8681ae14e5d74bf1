"""Optimizer, parameter groups and learning rate schedule."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.optim.muon import Muon
from torch import nn

from distill.errors import InputError
from distill.recipe.schema import Optim
from distill.training.muon import BatchedMuon

_log = logging.getLogger("distill")


def build_optimizer(spec: Optim, model: nn.Module, methods: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the timm `model` and the parameters of `methods`; the latter have no layer
    decay, and AdamW where the optimizer is Muon.

    Weight decay applies to matrices and kernels only: not to biases, norms, and what the model lists in
    `no_weight_decay()` (tokens and position embeddings). With `layer_decay` each group has an `lr_scale`, with
    `weight_decay_end` each has `decays`.

    Raises:
        InputError: unknown optimizer, one that needs second derivatives, or one that this machine cannot have.
    """
    known = list_optimizers()
    if spec.name.lower() not in known:
        raise InputError(f"optim.name: timm has no optimizer '{spec.name}'; it has {', '.join(known)}")
    if get_optimizer_info(spec.name.lower()).second_order:
        raise InputError(f"optim.name: {spec.name} needs second derivatives, which the loop does not compute.")
    try:
        return _build(spec, model, methods)
    except Exception as error:  # some need a GPU or another package, and say so in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"optim.name: {spec.name} cannot be had here ({reason}). Choose another one.") from error


def _build(spec: Optim, model: nn.Module, methods: nn.Module | None) -> torch.optim.Optimizer:
    parameters = inspect.signature(get_optimizer_class(spec.name, bind_defaults=False).__init__).parameters
    arguments: dict[str, Any] = {"momentum": spec.momentum}
    # Fused AdamW is one kernel a step, on CPU as on CUDA.
    if "fused" in parameters:
        arguments["fused"] = True
    if "ns_steps" in parameters:
        arguments |= _muon_arguments(model)
    decay = spec.weight_decay or spec.weight_decay_end or 0.0
    optimizer = create_optimizer_v2(
        model, opt=spec.name, lr=spec.lr, weight_decay=decay, layer_decay=spec.layer_decay, **arguments
    )
    if isinstance(optimizer, Muon) and optimizer.defaults["algo"] == "muon":
        optimizer = BatchedMuon.of(optimizer)
    for group in param_groups_weight_decay(methods, decay) if methods is not None else ():
        if group["params"]:
            optimizer.add_param_group(group | ({"use_fallback": True} if "ns_steps" in parameters else {}))
    if spec.weight_decay_end is not None:
        for group in optimizer.param_groups:
            group["decays"] = group["weight_decay"] > 0
    return optimizer


def _muon_arguments(model: nn.Module) -> dict[str, Any]:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is for matrices between hidden layers: the first
    projection, the heads, tokens and embeddings go to AdamW (nmuon: NAdamW), as do what the model lists in
    `keeps_from_muon()` and, by timm's choice, vectors and matrices of extreme shape.

    timm scales Muon's updates to the size of AdamW's, 0.2 sqrt(larger side) (Liu et al. 2025, arXiv 2502.16982, section
    2.2), so that one learning rate and weight decay serve both.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    ends = [config.get(key) or () for key in ("first_conv", "classifier")]
    names = [name for end in ends for name in ([end] if isinstance(end, str) else end)]
    kept: set[str] = getattr(model, "keeps_from_muon", set)()
    return {"fallback_list": [*(f"{name}.*" for name in names), *sorted(kept)], "fallback_no_weight_decay": True}


def learning_rate(spec: Optim, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then cosine to `min_lr` (Loshchilov and
    Hutter 2017, eq. 5) or constant.

    A pure function of the step. `total_steps` is that of all epochs of the recipe, even if `max_steps` ends the run
    early; the warm-up may be longer than the run.
    """
    warmup = spec.warmup_epochs * steps_per_epoch
    if step < warmup:
        return spec.lr * (step + 1) / (warmup + 1)
    if spec.schedule == "constant":
        return spec.lr
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return spec.min_lr + (spec.lr - spec.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def weight_decay(spec: Optim, step: int, *, total_steps: int) -> float:
    """Weight decay of optimizer step `step` (from 0): a cosine from `weight_decay` to `weight_decay_end` (Caron et al.
    2021, arXiv 2104.14294), or constant. `total_steps` as of the learning rate.
    """
    if spec.weight_decay_end is None:
        return spec.weight_decay
    way = 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
    return spec.weight_decay_end + (spec.weight_decay - spec.weight_decay_end) * way


def warn_of_long_warmup(spec: Optim, *, steps_per_epoch: int, total_steps: int) -> None:
    """Log a warm-up that does not end within the run's `total_steps`."""
    warmup = spec.warmup_epochs * steps_per_epoch
    if warmup >= total_steps:
        _log.warning(
            "optim.warmup_epochs: %g epochs are %d steps, and the run has %d: its learning rate only rises, to %.3g of "
            "optim.lr",
            spec.warmup_epochs, warmup, total_steps, total_steps / (warmup + 1),
        )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it on every group, times the group's `lr_scale` (layer decay) if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it on every group that has any, where it is scheduled."""
    for group in optimizer.param_groups:
        if group.get("decays"):
            group["weight_decay"] = value


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale each gradient, in place, to a norm of at most `limit` (up to torch's 1e-6). Without synchronising."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norms + 1e-6)).clamp(max=1.0).unbind())
