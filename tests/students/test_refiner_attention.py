"""Refined maps against plain loops in float64 that import nothing from distill."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.flops import count_flops
from distill.students.attention import build_attention


def normalised(maps: list[list[Tensor]], name: str, state, training: bool) -> list[list[Tensor]]:
    """Batch norm of maps[image][channel], each [N, N]."""
    found = [[map_.clone() for map_ in image] for image in maps]
    for channel in range(len(maps[0])):
        values = torch.cat([image[channel].flatten() for image in maps])
        mean, variance = state[f"{name}.running_mean"][channel], state[f"{name}.running_var"][channel]
        if training:
            mean = values.sum() / len(values)
            variance = ((values - mean) ** 2).sum() / len(values)
        for image in found:
            standard = (image[channel] - mean) / (variance + 1e-5).sqrt()
            image[channel] = state[f"{name}.weight"][channel] * standard + state[f"{name}.bias"][channel]
    return found


def brute_force(x: Tensor, heads: int, expansion: int, kernel: int, scale: float, state, training: bool) -> Tensor:
    batch, count, dim = x.shape
    width = dim // heads
    qkv = x @ state["qkv.weight"].T + state["qkv.bias"]
    parts = [[qkv[:, :, (3 * 0 + p) * dim + h * width :][:, :, :width] for h in range(heads)] for p in range(3)]
    maps = []
    for b in range(batch):
        image = []
        for h in range(heads):
            rows = []
            for i in range(count):
                logits = (parts[1][h][b] * parts[0][h][b, i]).sum(1) / math.sqrt(width)
                rows.append(logits.exp() / logits.exp().sum())
            image.append(torch.stack(rows))
        maps.append(image)

    def mixed(images: list[list[Tensor]], weight: Tensor) -> list[list[Tensor]]:
        return [
            [sum(row[c] * image[c] for c in range(len(image))) for row in weight.view(len(weight), -1)]
            for image in images
        ]

    def convolved(images: list[list[Tensor]], weight: Tensor) -> list[list[Tensor]]:
        found = []
        for image in images:
            found.append([])
            for c, plane in enumerate(image):
                rows = []
                for i, j in itertools.product(range(count), repeat=2):
                    total = plane.new_zeros(())
                    for u, v in itertools.product(range(kernel), repeat=2):
                        a, b = i + u - kernel // 2, j + v - kernel // 2
                        if 0 <= a < count and 0 <= b < count:
                            total = total + weight.view(-1, kernel, kernel)[c, u, v] * plane[a, b]
                    rows.append(total)
                found[-1].append(torch.stack(rows).view(count, count))
        return found

    def relu6(images: list[list[Tensor]]) -> list[list[Tensor]]:
        return [[plane.clamp(0, 6) for plane in image] for image in images]

    hidden = relu6(normalised(mixed(maps, state["expand.weight"]), "expand_norm", state, training))
    hidden = relu6(normalised(convolved(hidden, state["depthwise.weight"]), "depthwise_norm", state, training))
    reduced = normalised(mixed(hidden, state["reduce.weight"]), "reduce_norm", state, training)
    added = [[z + a for z, a in zip(*pair, strict=True)] for pair in zip(reduced, maps, strict=True)]
    refined = normalised(added, "output_norm", state, training)
    outputs = [torch.cat([scale * refined[b][h] @ parts[2][h][b] for h in range(heads)], dim=1) for b in range(batch)]
    return torch.stack(outputs) @ state["proj.weight"].T + state["proj.bias"]


def build(prefix: int = 1, **options):
    torch.manual_seed(0)
    options = {"expansion": 3, "kernel_size": 3, "scale": 1.0, "share": False} | options
    module = build_attention("refiner", 8, 2, grid=(2, 3), num_prefix_tokens=prefix, **options).double()
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.01, 0.1)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.7)
    return module


@pytest.fixture(params=["images last", "usual order"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images in eager code on a CPU, and all else."""
    if request.param == "images last":
        monkeypatch.setattr("distill.students.attention.refiner.LEAST_IMAGES", 1)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("prefix", "options"), [(1, {}), (2, {"expansion": 2}), (2, {"kernel_size": 5}), (1, {"scale": None})], ids=str
)
def test_values_and_gradients(prefix, options, training):
    module = build(prefix, **options).train(training)
    x = torch.randn(2, 6 + prefix, 8, dtype=torch.float64, requires_grad=True)
    state = {name: tensor.clone() for name, tensor in module.named_buffers()} | dict(module.named_parameters())
    sizes = options.get("expansion", 3), options.get("kernel_size", 3)
    scale = 0.5 if "scale" in options else 1.0
    expected = brute_force(x, 2, *sizes, scale, state, training)
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(expected)
    gradients, wish = (
        torch.autograd.grad((one * direction).sum(), [x, *module.parameters()]) for one in (output, expected)
    )
    torch.testing.assert_close(gradients, wish, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("form")
def test_gradcheck():
    module = build().train()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


def test_it_has_the_parameters_of_the_paper():
    for heads in (3, 6, 12):
        module = build_attention("refiner", 192, heads)
        plain = 4 * 192**2 + 4 * 192
        assert sum(map(torch.numel, module.parameters())) == plain + 6 * heads**2 + 43 * heads
        assert module.scale == (192 / heads) ** -0.5


@pytest.mark.parametrize("heads", [3, 12])
def test_flops(heads):
    module = build_attention("refiner", 192, heads)
    macs = 4 * 66 * 192**2 + 2 * 66**2 * 192 + (6 * heads**2 + 27 * heads) * 66**2
    assert count_flops(module, torch.zeros(1, 66, 192)) == 2 * macs


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_evaluation_follows_training_from_the_first_step(steps):
    """With timm's initial scale of weights and tokens as norms make them."""
    torch.manual_seed(0)
    module = build_attention("refiner", 96, 3, scale=1.0)
    torch.nn.init.trunc_normal_(module.qkv.weight, std=0.02)
    x = torch.randn(16, 66, 96)
    for _ in range(steps):
        output = module.train()(torch.randn(16, 66, 96))
    output, evaluated = module.train()(x), module.eval()(x)
    assert (evaluated - output).norm() / output.norm() < 0.1


def test_single_precision_is_enough_for_maps_of_small_variance():
    """Of a new network with many tokens, in both orders."""
    torch.manual_seed(0)
    module = build_attention("refiner", 24, 3)
    torch.nn.init.trunc_normal_(module.qkv.weight, std=0.02)
    x, found = torch.randn(16, 66, 24), []
    for images, kind in ((16, torch.float64), (16, torch.float32), (15, torch.float32)):
        one = copy.deepcopy(module).train().to(kind)
        output = one(x[:images].to(kind))
        gradients = torch.autograd.grad(output.square().sum(), one.parameters())
        found.append((output, *gradients, *one.buffers()))
    found = [[tensor.double() for tensor in of_kind] for of_kind in found]
    largest = max(exact.norm() for exact in found[0])
    for exact, single in zip(*found[:2], strict=True):
        # Small variances amplify rounding. The biases before a norm have gradients of 0.
        assert (single - exact).norm() <= 0.02 * exact.norm() + 1e-5 * largest
    assert (found[2][0] - found[0][0][:15]).norm() < 0.2 * found[2][0].norm(), "statistics of fewer images"


@pytest.mark.usefixtures("form")
@torch.no_grad()
def test_running_statistics_are_the_mean_and_then_an_exponential_one():
    module = build().train()
    norm, seen = module.expand_norm, []
    for _ in range(14):
        x = torch.randn(2, 7, 8, dtype=torch.float64)
        query, key, _ = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        maps = (query @ key.transpose(-1, -2) / 2).softmax(-1)
        seen.append(torch.einsum("ch,bhij->cbij", module.expand.weight[:, :, 0, 0], maps).flatten(1))
        module(x)
    mean, variance = torch.zeros(2, 6, dtype=torch.float64)
    for index, values in enumerate(seen):
        share = max(0.1, 1 / (index + 1))
        mean = (1 - share) * mean + share * values.mean(1)
        variance = (1 - share) * variance + share * values.var(1)
    assert norm.num_batches_tracked == 14
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("training", [True, False])
def test_maps_stay_in_single_precision_under_autocast(training):
    """The projections are rounded, the maps of these are not: equal to those of rounded queries and keys."""
    module = build(scale=None).float().train(training)
    x = torch.randn(2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        maps, value = module._weights(x)
        assert (maps.dtype, value.dtype) == (torch.float32, torch.bfloat16)
        assert module(x).dtype == torch.bfloat16
        rounded = module.qkv(x)
    monkey = torch.nn.Identity()
    module.qkv = monkey
    expected, _ = module._weights(rounded.float())
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [({"kernel_size": 2}, "odd"), ({"expansion": 0}, "expansion")])
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build_attention("refiner", 8, 2, **options)
    with pytest.raises(ValueError, match="3 heads"):
        build_attention("refiner", 8, 3)
