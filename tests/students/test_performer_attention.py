"""FAVOR+ against plain loops in float64 that import nothing from distill, and against softmax where it should agree."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.flops import count_flops
from distill.students.attention import build_attention
from distill.students.attention.performer import draw_features, favor_attention


def brute_force(query: Tensor, key: Tensor, value: Tensor, features: Tensor, epsilon: float, kernel: str) -> Tensor:
    batch, heads, queries, width = query.shape
    outputs = []
    for b, h in itertools.product(range(batch), range(heads)):

        def exponents(x: Tensor) -> Tensor:
            u = torch.stack([(row * x / width**0.25).sum() for row in features])
            return u if kernel == "relu" else u - (x * x).sum() / (2 * math.sqrt(width))

        def features_of(u: Tensor, largest: float) -> Tensor:
            if kernel == "relu":
                return u.clamp(min=0) + 1e-3
            return ((u - largest).exp() + epsilon) / math.sqrt(len(features))

        of_keys = [exponents(x) for x in key[b, h]]
        largest = max(u.max().item() for u in of_keys)
        of_keys = [features_of(u, largest) for u in of_keys]
        for x in query[b, h]:
            u = exponents(x)
            of_query = features_of(u, u.max().item())
            weights = torch.stack([(of_query * of_key).sum() for of_key in of_keys])
            outputs.append((weights[:, None] * value[b, h]).sum(0) / weights.sum())
    return torch.stack(outputs).view(batch, heads, queries, -1)


def inputs(std: float = 1.0, shape=(2, 2, 5, 4), queries: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    first = (*shape[:2], queries, shape[3])
    return [std * torch.randn(size, dtype=torch.float64).requires_grad_() for size in (first, shape, shape)]


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize(("std", "epsilon"), [(1.0, 1e-4), (4.0, 1e-2)])
def test_values_and_gradients(kernel, std, epsilon):
    qkv = [tensor.detach().mul(std).requires_grad_() for tensor in inputs()]
    features = torch.randn(7, 4, dtype=torch.float64)
    expected = brute_force(*qkv, features, epsilon, kernel)
    output = favor_attention(*qkv, features, epsilon=epsilon, kernel=kernel)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(expected)
    gradients, wish = (torch.autograd.grad((one * direction).sum(), qkv) for one in (output, expected))
    torch.testing.assert_close(gradients, wish, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prefix", [1, 2])
def test_the_module_is_the_function_between_its_projections(prefix):
    torch.manual_seed(0)
    module = build_attention("performer", 8, 2, grid=(3, 4), num_prefix_tokens=prefix, features=6).double()
    x = torch.randn(2, 12 + prefix, 8, dtype=torch.float64)
    parts = (x @ module.qkv.weight.T + module.qkv.bias).split(8, -1)
    qkv = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts]
    attended = brute_force(*qkv, module.features, 1e-4, "softmax").transpose(1, 2).flatten(2)
    expected = attended @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)
    maps = module.maps(x, prefix)
    answer = (maps.weights @ qkv[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(answer, attended[:, :prefix], rtol=0, atol=1e-10)
    torch.testing.assert_close(maps.weights.sum(-1), torch.ones(2, 2, prefix, dtype=torch.float64))


def test_many_features_approximate_softmax():
    query, key, value = (tensor.detach() for tensor in inputs(shape=(1, 2, 66, 64), queries=66))
    query, key = 0.3 * query, 0.3 * key
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = {}
    for number in (64, 1024, 8192):
        features = draw_features(number, 64, torch.Generator().manual_seed(0))
        output = favor_attention(query, key, value, features)
        errors[number] = ((output - exact).norm() / exact.norm()).item()
    uniform = ((value.mean(2, keepdim=True) - exact).norm() / exact.norm()).item()
    assert errors[8192] < errors[1024] < 0.6 * uniform
    assert errors[1024] < 0.5 * errors[64]


def test_large_queries_and_keys_still_have_gradients():
    """The maximum of u alone would leave nothing but epsilon."""
    qkv = [tensor.detach().mul(1.5).requires_grad_() for tensor in inputs(shape=(1, 1, 66, 64), queries=66)]
    output = favor_attention(*qkv, draw_features(64, 64, torch.Generator().manual_seed(0)))
    uniform = qkv[2].mean(2, keepdim=True)
    assert (output - uniform).norm() / uniform.norm() > 1
    assert all(gradient.norm() > 1 for gradient in torch.autograd.grad(output.square().sum(), qkv))


def test_images_do_not_see_one_another():
    query, key, value = (tensor.detach() for tensor in inputs())
    features = torch.randn(7, 4, dtype=torch.float64)
    alone = favor_attention(query[:1], key[:1], value[:1], features)
    loud = [torch.cat([tensor[:1], 50 * tensor[1:]]) for tensor in (query, key, value)]
    torch.testing.assert_close(favor_attention(*loud, features)[:1], alone, rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = favor_attention(query[:1], key[:1, :, order], value[:1, :, order], features)
    torch.testing.assert_close(moved, alone, rtol=0, atol=1e-12)


def test_features_are_orthogonal_with_the_lengths_of_normal_vectors():
    features = draw_features(10, 4, torch.Generator().manual_seed(0))
    for block in features.split(4):
        cosines = torch.nn.functional.normalize(block) @ torch.nn.functional.normalize(block).T
        torch.testing.assert_close(cosines, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-12)
    many = draw_features(8000, 4, torch.Generator().manual_seed(0))
    assert 3.9 < many.square().sum(1).mean() < 4.1
    # Uniform directions; the signs that LAPACK chooses would make the first coordinate of the first row negative.
    first = torch.nn.functional.normalize(many)[::4, 0]
    assert abs(first.mean()) < 0.04
    assert 0.23 < first.square().mean() < 0.27


def test_redraws_depend_on_seed_and_passes_alone():
    torch.manual_seed(0)
    module = build_attention("performer", 8, 2, features=6, redraw=4)
    other = build_attention("performer", 8, 2, features=6, redraw=4)
    assert not torch.equal(module.features, other.features)
    start = copy.deepcopy(module)
    history = [module.features.clone()]
    for passes in (3, 3, 1, 2, 0, 3):
        module.after_step(passes)
        history.append(module.features.clone())
    same = [torch.equal(a, b) for a, b in itertools.pairwise(history)]
    assert same == [True, False, True, False, True, False]  # after 3, 6, 7, 9, 9 and 12 passes
    assert module.passes == 12
    resumed = build_attention("performer", 8, 2, features=6, redraw=4)
    start.after_step(6)
    resumed.load_state_dict(start.state_dict())
    for passes in (1, 2, 3):
        resumed.after_step(passes)
    assert torch.equal(resumed.features, history[-1])
    never = build_attention("performer", 8, 2, features=6, redraw=0)
    before = never.features.clone()
    never.after_step(10_000)
    assert torch.equal(never.features, before)


@torch.no_grad()
def test_forward_passes_change_nothing():
    module = build_attention("performer", 8, 2, features=6, redraw=1)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for training in (True, False):
        module.train(training)(torch.randn(2, 5, 8))
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_single_precision_inside():
    module = build_attention("performer", 8, 2, features=6)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    query, key, value = (tensor.detach().bfloat16() for tensor in inputs())
    features = torch.randn(7, 4)
    output = favor_attention(query, key, value, features)
    expected = favor_attention(query.float(), key.float(), value.float(), features).bfloat16()
    assert torch.equal(output, expected)


def test_flops():
    module = build_attention("performer", 192, 3, features=32)
    macs = 4 * 66 * 192**2 + 4 * 66 * 32 * 192 + 2 * 66 * 32 * 3
    assert count_flops(module, torch.zeros(1, 66, 192)) == 2 * macs


def test_the_default_number_of_features():
    assert build_attention("performer", 192, 3).features.shape == (266, 64)
    with pytest.raises(ValueError, match="features"):
        build_attention("performer", 8, 2, features=0)
    with pytest.raises(ValueError, match="3 heads"):
        build_attention("performer", 8, 3)
