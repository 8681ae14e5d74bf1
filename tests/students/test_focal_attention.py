"""Focal attention against plain loops in float64 that import nothing from distill."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.flops import count_flops
from distill.students.attention import build_attention
from distill.students.focal import FocalAttention

# (grid, window, expand, focal window): whole and ragged windows, rings wider than a window, a grid within one window.
LAYOUTS = [
    ((5, 7), 4, 2, 3),
    ((8, 10), 4, 2, 3),
    ((7, 8), 4, 1, 1),
    ((6, 4), 2, 1, 3),
    ((5, 5), 2, 3, 5),
    ((7, 6), 3, 2, 3),
    ((4, 4), 4, 2, 1),
    ((3, 2), 4, 2, 3),
    ((4, 3), 2, 0, 1),
    ((3, 3), 1, 1, 3),
]


def brute_force(x: Tensor, grid: tuple[int, int], options: tuple[int, int, int], heads: int, state) -> Tensor:
    """Tokens [N, C] of one image, prefix tokens first -> [N, C], key by key."""
    height, width = grid
    window, expand, focal = options
    channels = x.shape[1]
    prefix = len(x) - height * width
    qkv = x @ state["qkv.weight"].T + state["qkv.bias"]
    ring = {(int(r), int(c)): index for index, (r, c) in enumerate(state["ring_offsets"])}
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    pooled = {}
    for i, j in itertools.product(range(rows), range(columns)):
        token = torch.zeros(channels, dtype=x.dtype) + state["pool.bias"]
        for r, c in itertools.product(range(window), repeat=2):
            y, z = i * window + r, j * window + c
            if y < height and z < width:
                token = token + state["pool.weight"].view(-1)[r * window + c] * x[prefix + y * width + z]
        pooled[i, j] = token @ state["qkv.weight"].T + state["qkv.bias"]

    def head(row: Tensor, part: int, h: int) -> Tensor:
        d = channels // heads
        return row[part * channels + h * d : part * channels + (h + 1) * d]

    outputs = []
    for n in range(len(x)):
        merged = []
        for h in range(heads):
            keys = [(qkv[p], 0.0) for p in range(prefix)]
            if n < prefix:
                keys += [(qkv[p], 0.0) for p in range(prefix, len(x))]
            else:
                y, z = divmod(n - prefix, width)
                i, j = y // window, z // window
                r, c = y - i * window, z - j * window
                for ky, kz in itertools.product(range(height), range(width)):
                    dy, dz = ky - i * window, kz - j * window
                    row = qkv[prefix + ky * width + kz]
                    if 0 <= dy < window and 0 <= dz < window:
                        keys.append((row, state["bias_window"][h, r - dy + window - 1, c - dz + window - 1]))
                    elif -expand <= dy < window + expand and -expand <= dz < window + expand:
                        keys.append((row, state["bias_ring"][h, r * window + c, ring[dy, dz]]))
                for (a, b), row in pooled.items():
                    fy, fz = a - i + focal // 2, b - j + focal // 2
                    if 0 <= fy < focal and 0 <= fz < focal:
                        keys.append((row, state["bias_coarse"][h, r - fy + focal - 1, c - fz + focal - 1]))
            query = head(qkv[n], 0, h)
            logits = torch.stack([query @ head(row, 1, h) / math.sqrt(len(query)) + bias for row, bias in keys])
            weights = logits.exp() / logits.exp().sum()
            merged.append((weights[:, None] * torch.stack([head(row, 2, h) for row, _ in keys])).sum(0))
        outputs.append(torch.cat(merged))
    return torch.stack(outputs) @ state["proj.weight"].T + state["proj.bias"]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module.double()


@functools.cache
def expectation(layout):
    """A map, and what the loops make of it: the answer and the gradients of the sum of its squares."""
    grid, *options = layout
    module = randomised(FocalAttention(4, 2, *options))
    x = torch.randn(1, *grid, 4, dtype=torch.float64, requires_grad=True)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = brute_force(x.flatten(1, 2)[0], grid, options, 2, state).view(x.shape)
    wanted = [x, *module.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), wanted, allow_unused=True, materialize_grads=True)
    return x, expected.detach(), gradients


@pytest.fixture(params=["windows", "dense", "masked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager code on a CPU in two forms, and what compilers, exports and other devices take."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "masked")
    if request.param == "dense":
        monkeypatch.setattr("distill.students.attention.windows.is_faster_dense", lambda *_: True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_gradients_of_a_map(layout):
    x, expected, wish = expectation(layout)
    module = randomised(FocalAttention(4, 2, *layout[1:]))
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(gradients, wish, rtol=1e-9, atol=1e-9)
    single = module.float()(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("layout", [((4, 4), 2, 1, 3), ((5, 7), 4, 2, 3), ((3, 5), 2, 1, 1)], ids=str)
def test_values_and_gradients_of_tokens(layout, prefix):
    grid, window, expand, focal = layout
    options = {"window": window, "expand": expand, "focal_window": focal}
    module = randomised(build_attention("focal", 4, 2, grid=grid, num_prefix_tokens=prefix, **options))
    x = torch.randn(2, prefix + grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = torch.stack([brute_force(image, grid, (window, expand, focal), 2, state) for image in x])
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(expected)
    gradients, wish = (
        torch.autograd.grad((one * direction).sum(), [x, *module.parameters()]) for one in (output, expected)
    )
    torch.testing.assert_close(gradients, wish, rtol=1e-9, atol=1e-9)
    # The pictures: weights of all tokens and pooled windows, and what of the tokens is in the answers.
    count = x.shape[1]
    maps = module.maps(x, count)
    assert maps.weights.shape[:3] == (2, 2, count)
    torch.testing.assert_close(maps.weights.sum(-1), torch.ones(2, 2, count, dtype=torch.float64))
    with torch.no_grad():
        module.qkv.bias.zero_()
        module.pool.bias.zero_()
        module.proj.bias.zero_()
        maps, value = module.maps(x, count), module.qkv(x)[..., 8:].unflatten(-1, (2, 2)).transpose(1, 2)
        answer = ((maps.weights @ maps.covered.double()) @ value).transpose(1, 2).flatten(2) @ module.proj.weight.T
        torch.testing.assert_close(answer, module(x), rtol=0, atol=1e-6)
        few = module.maps(x, prefix)
    assert torch.equal(few.covered, torch.eye(count))
    torch.testing.assert_close(few.weights, maps.weights[:, :, :prefix, :count], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [4, 32])
def test_forms_and_chunks_of_images_are_equal(monkeypatch, dim):
    """With heads so wide that the dense form keeps its weights, and so narrow that it computes them again."""
    module = build_attention("focal", dim, 2, grid=(4, 4), num_prefix_tokens=2)
    torch.nn.init.normal_(module.bias_window)
    x, found = torch.randn(5, 18, dim), []
    for dense, size in itertools.product((False, True), (2**17, 1, 1000)):
        monkeypatch.setattr("distill.students.attention.windows.is_faster_dense", lambda *_, dense=dense: dense)
        monkeypatch.setattr("distill.students.attention.windows_cpu.LOGITS_PER_THREAD", size)
        output = module(x)
        found.append((output, *torch.autograd.grad(output.square().sum(), module.parameters())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_training_after_evaluation():
    """What evaluation keeps of a grid can be used in training."""
    module = build_attention("focal", 4, 2, grid=(3, 3), num_prefix_tokens=2)
    x = torch.randn(16, 11, 4)
    with torch.inference_mode():
        module.eval()(x)
    module.train()(x).sum().backward()
    assert module.bias_coarse.grad is not None


@pytest.mark.parametrize(("window", "expand", "macs"), [(2, 1, 1_746_432), (4, 2, 1_390_080)])
def test_flops_are_those_of_the_keys_that_there_are(window, expand, macs):
    """Of ViT-Tiny on 8 x 8 patches and two tokens, beside its four projections; by hand: queries times keys twice, the
    prefix tokens' rows, keys and values of the pooled windows, and the pooling."""
    options = {"window": window, "expand": expand, "focal_window": 3}
    module = build_attention("focal", 192, 3, grid=(8, 8), num_prefix_tokens=2, **options)
    assert count_flops(module, torch.zeros(1, 66, 192)) == 2 * (4 * 66 * 192**2 + macs)


@pytest.mark.parametrize(
    ("grid", "prefix", "words"), [(None, 2, "give grid"), ((4, 4), 1, "not 18 tokens"), ((3, 4), 2, "3x4")]
)
def test_tokens_that_are_no_grid_are_refused(grid, prefix, words):
    with pytest.raises(ValueError, match=words):
        build_attention("focal", 4, 2, grid=grid, num_prefix_tokens=prefix)(torch.zeros(1, 18, 4))


def test_it_starts_as_specified():
    module = FocalAttention(64, 2, 4, 2, 3)
    assert torch.equal(module.pool.weight, torch.full((1, 16), 1 / 16))
    assert not any(parameter.any() for parameter in (module.pool.bias, module.bias_window, module.qkv.bias))
    for table in (module.bias_ring, module.bias_coarse, module.qkv.weight):
        assert 0.015 < table.std() < 0.025
    assert module.ring_offsets.shape == (48, 2)
    shapes = [tuple(table.shape) for table in (module.bias_window, module.bias_ring, module.bias_coarse)]
    assert shapes == [(2, 7, 7), (2, 16, 48), (2, 6, 6)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((8, 3, 2, 1, 3), "3 heads"), ((8, 2, 0, 1, 3), "at least one token"), ((8, 2, 2, 1, 2), "odd")],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        FocalAttention(*arguments)
