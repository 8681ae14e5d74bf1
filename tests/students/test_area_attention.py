"""Area attention against an enumeration of areas in plain loops that imports nothing from distill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.students.attention import PatchGrid
from distill.students.attention.area import (
    LEARNED_KEY_MODES,
    PLAIN_KEY_MODES,
    VALUE_MODES,
    AreaAttention,
    area_attention,
)

KEY_MODES = (*PLAIN_KEY_MODES, *LEARNED_KEY_MODES)
# (max_area, grid, prefix tokens): runs with 0, 1 and 2 prefix tokens, boxes on square and other grids.
LAYOUTS = [
    (2, (2, 3), 0),
    (3, (1, 4), 1),
    (4, (2, 2), 2),
    (1, (2, 2), 2),
    ((2, 2), (3, 3), 0),
    ((2, 2), (2, 4), 1),
    ((3, 2), (3, 2), 2),
    ((1, 3), (2, 3), 2),
    ((1, 1), (2, 2), 1),
]


def enumerate_areas(max_area, grid: tuple[int, int], prefix: int) -> list[tuple[list[int], int, int]]:
    """Every area as (its tokens, height, width)."""
    height, width = grid
    found = []
    if isinstance(max_area, int):
        tokens = prefix + height * width
        for length in range(1, max_area + 1):
            for start in range(tokens - length + 1):
                found.append((list(range(start, start + length)), 1, length))
        return found
    for token in range(prefix):
        found.append(([token], 1, 1))
    for h in range(1, max_area[0] + 1):
        for w in range(1, max_area[1] + 1):
            for y in range(height - h + 1):
                for x in range(width - w + 1):
                    tokens = [prefix + (y + i) * width + x + j for i in range(h) for j in range(w)]
                    found.append((tokens, h, w))
    return found


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, areas, area_key: Callable[..., Tensor], value_mode: str, top_k: int = 0
) -> Tensor:
    batch, heads, queries, width = query.shape
    rows = []
    for b, h in itertools.product(range(batch), range(heads)):
        keys, values = [], []
        for index, (tokens, high, wide) in enumerate(areas):
            keys.append(area_key([key[b, h, token] for token in tokens], high, wide, (b, h, index)))
            members = [value[b, h, token] for token in tokens]
            total = members[0]
            for member in members[1:]:
                total = torch.maximum(total, member) if value_mode == "max" else total + member
            values.append(total / len(members) if value_mode == "mean" else total)
        for row in range(queries):
            logits = (torch.stack(keys) * query[b, h, row]).sum(1) / math.sqrt(width)
            weights = (logits - logits.max()).exp()
            if top_k:
                smallest = sorted(weights.tolist())[-min(top_k, len(areas))]
                weights = weights * (weights >= smallest)
            rows.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
    return torch.stack(rows).view(batch, heads, queries, -1)


def key_maker(mode: str, noise: Tensor | None, module: AreaAttention | None = None) -> Callable[..., Tensor]:
    """How the paper makes an area's key of its tokens' keys."""

    def make(members: list[Tensor], high: int, wide: int, place: tuple[int, int, int]) -> Tensor:
        mean = sum(members[1:], members[0]) / len(members)
        variance = sum((member - mean) ** 2 for member in members) / len(members)
        deviation = (variance + 1e-6).sqrt()
        largest = members[0]
        for member in members[1:]:
            largest = torch.maximum(largest, member)
        sample = mean if noise is None else mean + deviation * noise[place]
        if mode in ("mean", "max", "sample"):
            return {"mean": mean, "max": largest, "sample": sample}[mode]
        assert module is not None
        size = torch.cat([module.height_embedding[high - 1], module.width_embedding[wide - 1]])
        features = {
            "concat": lambda: torch.cat([mean, deviation, size]),
            "max_concat": lambda: torch.cat([largest, size]),
            "sum": lambda: mean + deviation + size,
            "sample_concat": lambda: torch.cat([sample, size]),
            "sample_sum": lambda: sample + size,
        }[mode]()
        first, second = module.key_mlp[0], module.key_mlp[2]
        hidden = (first.weight @ features + first.bias).clamp(min=0)
        return second.weight @ hidden + second.bias

    return make


def make_module(mode: str, value_mode: str, layout, top_k: int = 0) -> AreaAttention:
    max_area, grid, prefix = layout
    torch.manual_seed(1)
    module = AreaAttention(
        8, 2, max_area=max_area, grid=PatchGrid(*grid), num_prefix_tokens=prefix,
        key_mode=mode, value_mode=value_mode, top_k=top_k,
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module.double()


def noise_for(module: AreaAttention, areas, seed: int) -> Tensor | None:
    if "sample" not in module.key_mode or not module.training:
        return None
    torch.manual_seed(seed)
    return torch.randn(1, module.num_heads, len(areas), module.head_dim, dtype=torch.float64)


def split_heads(module: AreaAttention, x: Tensor) -> list[Tensor]:
    batch, tokens, dim = x.shape
    projected = x @ module.qkv.weight.T + module.qkv.bias
    return [part.reshape(batch, tokens, module.num_heads, -1).transpose(1, 2) for part in projected.split(dim, dim=-1)]


@pytest.mark.parametrize("value_mode", VALUE_MODES)
@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_gradients_equal_the_enumeration(layout, key_mode, value_mode):
    module = make_module(key_mode, value_mode, layout)
    max_area, grid, prefix = layout
    tokens = prefix + grid[0] * grid[1]
    x = torch.randn(1, tokens, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, tokens, 8, dtype=torch.float64)
    areas = enumerate_areas(max_area, grid, prefix)
    noise = noise_for(module, areas, seed=3)
    query, key, value = split_heads(module, x)
    expected = brute_force(query, key, value, areas, key_maker(key_mode, noise, module), value_mode)
    expected = expected.transpose(1, 2).reshape(x.shape) @ module.proj.weight.T + module.proj.bias
    wanted = [x, *module.parameters()]
    expected_gradients = torch.autograd.grad((expected * direction).sum(), wanted)

    torch.manual_seed(3)
    output = module(x)
    gradients = torch.autograd.grad((output * direction).sum(), wanted)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for gradient, wish in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wish, rtol=1e-10, atol=1e-10)

    if noise is None:  # the noise of float32 is another
        single = module.float()(x.float())
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiling", [False, True], ids=["token-weights", "pooled"])
@pytest.mark.parametrize("value_mode", VALUE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_function_equals_the_enumeration_by_either_path(layout, value_mode, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    max_area, grid, prefix = layout
    tokens = prefix + grid[0] * grid[1]
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, tokens, tokens)]
    areas = enumerate_areas(max_area, grid, prefix)
    expected = brute_force(*inputs, areas, key_maker("mean", None), value_mode)
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    output = area_attention(*inputs, max_area=max_area, grid=grid, num_prefix_tokens=prefix, value_mode=value_mode)
    gradients = torch.autograd.grad((output * direction).sum(), inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-10)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    output = area_attention(*single, max_area=max_area, grid=grid, num_prefix_tokens=prefix, value_mode=value_mode)
    gradients = torch.autograd.grad((output * direction.float()).sum(), single)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, wish in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wish, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 7, 10_000])
@pytest.mark.parametrize("layout", [(3, (2, 3), 1), ((2, 2), (2, 4), 2)], ids=str)
# Not max keys: areas that share their largest token tie, and what is kept then depends on the last bit.
@pytest.mark.parametrize("key_mode", ["mean", "concat"])
def test_top_k_keeps_the_largest_weights(key_mode, layout, top_k):
    module = make_module(key_mode, "sum", layout, top_k=top_k)
    max_area, grid, prefix = layout
    x = torch.randn(2, prefix + grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    areas = enumerate_areas(max_area, grid, prefix)
    expected = brute_force(*split_heads(module, x), areas, key_maker(key_mode, None, module), "sum", top_k)
    expected = module.proj(expected.transpose(1, 2).reshape(x.shape))
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(one.square().sum(), x)[0] for one in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_ties_keep_more_than_top_k():
    key = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    value = torch.arange(3.0, dtype=torch.float64).view(1, 1, 3, 1)
    output = area_attention(torch.ones_like(key), key, value, max_area=1, top_k=1)
    assert torch.equal(output, torch.ones(1, 1, 3, 1, dtype=torch.float64))


@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("max_area", [2, (2, 2)], ids=str)
def test_gradcheck(max_area, key_mode):
    module = make_module(key_mode, "sum", (max_area, (2, 2), 1)).eval()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize("value_mode", VALUE_MODES)
@pytest.mark.parametrize("top_k", [0, 2])
def test_gradcheck_of_the_function(value_mode, top_k):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *qkv: area_attention(
            *qkv, max_area=(2, 3), grid=(2, 3), num_prefix_tokens=0, value_mode=value_mode, top_k=top_k
        ),
        inputs,
        fast_mode=True,
    )


def test_samples_are_noisy_in_training_and_the_mean_in_evaluation():
    layout = ((2, 2), (3, 3), 2)
    module, mean = make_module("sample", "sum", layout), make_module("mean", "sum", layout)
    mean.load_state_dict(module.state_dict())
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    assert not torch.allclose(module(x), module(x))
    assert torch.equal(module.eval()(x), mean(x))
    for mode in ("sample_sum", "sample_concat"):
        learned = make_module(mode, "sum", layout)
        assert not torch.allclose(learned(x), learned(x))
        assert torch.equal(learned.eval()(x), learned(x))
