"""Learning rate and parameter groups."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim.muon import Muon, zeropower_via_newtonschulz
from timm.scheduler import CosineLRScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distill.errors import InputError
from distill.methods.base import Shapes
from distill.recipe.schema import Optim
from distill.registry import find
from distill.students import register_models
from distill.training.muon import BatchedMuon, iteration_dtype
from distill.training.optim import (
    build_optimizer,
    clip_each,
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    warn_of_long_warmup,
    weight_decay,
)
from tests.conftest import DEVICES
from tests.students.helpers import KINDS, of_kind


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


@pytest.mark.parametrize(("epochs", "said"), [(3.0, True), (4.0, True), (1.9, False)])
def test_a_warm_up_longer_than_the_run_is_said(
    epochs: float, said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    warn_of_long_warmup(Optim(warmup_epochs=epochs), steps_per_epoch=10, total_steps=30)
    message = f"optim.warmup_epochs: {epochs:g} epochs are {round(10 * epochs)} steps, and the run has 30"
    assert (message in caplog.text) == said
    if epochs == 4.0:
        assert "to 0.732 of optim.lr" in caplog.text  # 30 of 41 steps


def test_the_weight_decay_follows_a_cosine_or_stays() -> None:
    spec = Optim(weight_decay=0.04, weight_decay_end=0.4)
    values = [weight_decay(spec, step, total_steps=100) for step in (0, 25, 50, 100)]
    assert values == pytest.approx([0.04, 0.4 - 0.36 * (1 + math.sqrt(0.5)) / 2, 0.22, 0.4])
    assert {weight_decay(Optim(weight_decay=0.3), step, total_steps=9) for step in range(10)} == {0.3}


@pytest.mark.parametrize("start", [0.04, 0.0])
@pytest.mark.parametrize("name", ["adamw", "muon", "nmuon"])
def test_a_scheduled_weight_decay_is_that_of_matrices_and_heads_are_adamws(name: str, start: float) -> None:
    """Also where it begins at 0. A head of DINO and its moving average, of which only the first learns."""
    variant = find("methods", "dino")
    options = variant.options.model_validate({"method": "dino", "prototypes": 8, "hidden": 6, "bottleneck": 5})
    methods = torch.nn.ModuleDict({"dino": variant.implementation(options, Shapes(embedding_width=4))})
    model = timm.create_model("test_vit", num_classes=0)
    spec = Optim(name=name, weight_decay=start, weight_decay_end=0.4)
    optimizer = build_optimizer(spec, model, methods)
    set_weight_decay(optimizer, 0.2)
    names = {parameter: key for module in (model, methods) for key, parameter in module.named_parameters()}
    found = {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}
    assert found.keys() == {key for parameter, key in names.items() if parameter.requires_grad}
    assert "dino.views.head.last.weight" in found
    assert "dino.views.average.last.weight" not in found
    for key, group in found.items():
        plain = key.endswith(".bias") or "norm" in key or key in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if plain else 0.2), key
        if name != "adamw" and key.startswith("dino."):
            assert group["use_fallback"], key


@pytest.mark.parametrize("start", [0.1, 0.0])
def test_a_step_decays_by_the_scheduled_value(start: float) -> None:
    """Without gradients a step is the decay alone."""
    model = timm.create_model("test_vit", num_classes=0)
    optimizer = build_optimizer(Optim(name="adamw", lr=0.5, weight_decay=start, weight_decay_end=0.4), model)
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.5)
    set_weight_decay(optimizer, 0.3)
    optimizer.step()
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight, before * (1 - 0.5 * 0.3))


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (1,))]
    for parameter, scale in zip(parameters, (10.0, 0.01, 2.0, 0.0), strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    frozen = torch.nn.Parameter(torch.zeros(2))
    before = [parameter.grad.tolist() for parameter in parameters]  # type: ignore[union-attr]
    clip_each([*parameters, frozen], 3.0)
    for parameter, values in zip(parameters, before, strict=True):
        flat = torch.tensor(values, dtype=torch.float64).flatten().tolist()
        norm = math.sqrt(sum(value**2 for value in flat))
        expected = [value * min(1.0, 3.0 / (norm + 1e-6)) for value in flat]
        assert parameter.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr]
    assert frozen.grad is None


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


def test_an_optimizer_of_second_order_is_refused() -> None:
    with pytest.raises(InputError, match=r"optim\.name: adahessian needs second derivatives"):
        build_optimizer(Optim(name="adahessian"), torch.nn.Linear(2, 2))


def _area_vit() -> torch.nn.Module:
    register_models()
    attention = {"max_area": 2, "blocks": [0], "key_mode": "concat"}
    return timm.create_model(
        "area_vit_nano", img_size=8, patch_size=4, depth=2, distilled=True, num_classes=3, attention=attention
    )


def test_muon_leaves_the_kernels_and_tables_of_attention_kinds_to_adamw() -> None:
    register_models()
    for name, attention in KINDS.items():
        architecture, options = of_kind(name, blocks=[0, 1])
        model = timm.create_model(architecture, img_size=8, patch_size=4, depth=2, num_classes=3, num_heads=6,
                                  attention=options)  # fmt: skip
        optimizer = build_optimizer(Optim(name="muon", lr=0.01, weight_decay=0.1), model)
        _stepped(optimizer, model)
        names = {parameter: key for key, parameter in model.named_parameters()}
        by_muon = {names[parameter] for parameter, state in optimizer.state.items() if state["use_muon"]}
        layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert by_muon == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}, name
        spared = ("token", "pos_embed", ".bias_window", ".bias_ring", ".bias_coarse")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and not names[parameter].endswith(spared))
        assert attention["kind"] in architecture


def _stepped(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By how much the optimizer moves each parameter where all gradients are ones and twos by turns."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        ones = torch.ones(parameter.numel())
        ones[::2] += 1
        parameter.grad = ones.view_as(parameter)
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon"])
def test_muon_takes_the_matrices_between_hidden_layers(name: str, layer_decay: float | None) -> None:
    model = _area_vit()
    optimizer = build_optimizer(Optim(name=name, lr=0.01, momentum=0.95, layer_decay=layer_decay), model)
    _stepped(optimizer, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[parameter] for parameter, state in optimizer.state.items() if state["use_muon"]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    learned_keys = {"blocks.0.attn.key_mlp.0.weight", "blocks.0.attn.key_mlp.2.weight"}
    assert by_muon == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers} | learned_keys
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decayed = parameter.ndim > 1 and not names[parameter].endswith(("token", "pos_embed", "_embedding"))
            assert (group["weight_decay"] > 0) == decayed, names[parameter]
    assert len({group.get("lr_scale", 1.0) for group in optimizer.param_groups}) == (1 if layer_decay is None else 4)


@pytest.mark.parametrize(
    ("model", "stems", "others", "tables"),
    [
        (
            "focal_nano",
            {"stem.proj"},
            {"stages.1.downsample.patches.proj", "pool"},
            {"bias_window", "bias_ring", "bias_coarse"},
        ),
        ("regionvit_nano", {"stem.local", "stem.regional"}, {"stages.1.downsample.conv"}, {"bias_local"}),
        ("lg_nano", {"stem.proj"}, {"stages.1.downsample.reduction"}, {"relative_position_bias_table"}),
    ],
)
def test_muon_and_weight_decay_in_pyramids(model: str, stems: set[str], others: set[str], tables: set[str]) -> None:
    """Muon takes the blocks' matrices and full convolutions between stages; tables of biases are not decayed."""
    network = timm.create_model(model, distilled=True, depths=[1, 1], heads=[3, 6], num_classes=3)
    optimizer = build_optimizer(Optim(name="nmuon", lr=0.01, momentum=0.95), network)
    _stepped(optimizer, network)
    names = {parameter: name for name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            layer = name.removesuffix(".weight")
            decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in tables
            assert (group["weight_decay"] > 0) == decayed, name
            spared = layer in {*stems, "head", "head_dist", "stages.1.downsample.conv"} or layer.endswith(".pool")
            by_muon = decayed and not spared
            assert optimizer.state[parameter]["use_muon"] == by_muon, name
    assert {
        name for name in stems | others if not any(key.endswith(f"{name}.weight") for key in names.values())
    } == set()


@pytest.mark.parametrize("name", ["muon", "nmuon"])
def test_one_learning_rate_schedules_muon_and_its_adamw(name: str) -> None:
    """Both parts' updates have AdamW's size and follow the rate that is set: a fifth of it moves all a fifth as far."""
    moves = []
    for rate in (0.01, 0.002):
        torch.manual_seed(0)
        model = _area_vit()
        optimizer = build_optimizer(Optim(name=name, lr=0.01, weight_decay=0.0), model)
        set_learning_rate(optimizer, rate)
        moves.append(_stepped(optimizer, model))
    for key, move in moves[0].items():
        torch.testing.assert_close(moves[1][key] * 5, move, rtol=1e-2, atol=1e-6, msg=key)
        assert move.norm() > 0, key
    matrix = moves[0]["blocks.1.mlp.fc1.weight"]
    assert float(matrix.double().svd().S[0]) == pytest.approx(0.01 * 0.2 * 384**0.5, rel=0.3)  # Liu et al. 2025


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def _muons(name: str, **options: Any) -> Iterator[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """timm's and ours, with the same groups, on equal models with kernels of convolutions."""
    for batched in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(_area_vit(), torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(4, 8, 3))
        model.to(memory_format=torch.channels_last)
        optimizer = create_optimizer_v2(model, opt=name, lr=3e-3, weight_decay=0.05, momentum=0.95, **options)
        assert isinstance(optimizer, Muon)
        yield model, BatchedMuon.of(optimizer) if batched else optimizer


def _give_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


@pytest.mark.parametrize("name", ["muon", "nmuon"])
def test_batched_muon_makes_timms_updates_in_few_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_our_type = partial(zeropower_via_newtonschulz, dtype=iteration_dtype(torch.device("cpu")))
    monkeypatch.setattr("timm.optim.muon.zeropower_via_newtonschulz", in_our_type)
    (timms, its), (ours, batched) = _muons(name, layer_decay=0.9)
    counts = []
    for step in range(4):
        for model, optimizer in ((timms, its), (ours, batched)):
            _give_gradients(model, step)
            with Operators() as operators:
                optimizer.step()
            counts.append(operators.count)
    for (key, expected), found in zip(timms.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=key)
    assert counts[-1] < 0.7 * counts[-2], "two blocks in twelve groups"


def test_the_operators_of_batched_muon_do_not_grow_with_the_depth() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    optimizer = build_optimizer(Optim(name="nmuon", momentum=0.95), model)
    for step in range(2):
        _give_gradients(model, step)
        with Operators() as operators:
            optimizer.step()
    assert operators.count <= 300


def test_a_skipped_step_of_batched_muon_changes_nothing_and_a_scaled_one_what_it_would() -> None:
    (model, optimizer), (other, unscaled) = ([*_muons("nmuon")][1] for _ in range(2))
    for step in (0, 1):
        for one, its in ((model, optimizer), (other, unscaled)):
            _give_gradients(one, step)
            its.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    for one, its in ((model, optimizer), (other, unscaled)):
        _give_gradients(one, 2)
        its.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for parameter in model.parameters():
        parameter.grad *= 1024.0
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
    optimizer.step()
    unscaled.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@DEVICES
def test_a_resumed_muon_takes_the_step_that_it_would_have_taken(device: str) -> None:
    (model, optimizer), (other, resumed) = ([*_muons("nmuon")][1] for _ in range(2))
    model.to(device), other.to(device)
    _give_gradients(model, 0)
    optimizer.step()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(tree_map_only(torch.Tensor, torch.Tensor.cpu, copy.deepcopy(optimizer.state_dict())))
    for one, its in ((model, optimizer), (other, resumed)):
        _give_gradients(one, 1)
        its.step()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_loaded_muon_has_its_step_counts_beside_the_parameters() -> None:
    """They come from a checkpoint, on the CPU, where an update on a GPU cannot use them."""
    optimizers = [
        BatchedMuon([torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((8, 8), (3,))])
        for device in ("cpu", "meta")
    ]
    for group in optimizers[0].param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert {state["step"].device.type for state in optimizers[1].state.values() if "step" in state} == {"meta"}
