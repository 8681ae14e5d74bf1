"""Focal attention against plain loops in float64 that import nothing from distill."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill.students.focal import FocalAttention

# (grid, window, expand, focal window): whole and ragged windows, rings wider than a window, a grid within one window.
LAYOUTS = [
    ((8, 8), 4, 2, 3),
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_gradients_of_a_map(layout):
    grid, *options = layout
    module = randomised(FocalAttention(4, 2, *options))
    x = torch.randn(2, *grid, 4, dtype=torch.float64, requires_grad=True)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = torch.stack([brute_force(image, grid, options, 2, state) for image in x.flatten(1, 2)]).view(x.shape)
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(expected)
    wanted = [x, *module.parameters()]
    gradients, wish = (
        torch.autograd.grad((one * direction).sum(), wanted, allow_unused=True, materialize_grads=True)
        for one in (output, expected)
    )
    torch.testing.assert_close(gradients, wish, rtol=1e-9, atol=1e-9)
    single = module.float()(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


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
