"""LG-Transformer's attention against loops over queries, paths and windows, and against timm's Swin Transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from distill.students.local_global import LocalGlobalAttention

Grid = dict[tuple[int, int], Tensor]


def attention(
    named: Mapping[str, Tensor], grid: Grid, size: tuple[int, int], heads: int, window: int, shift: int
) -> Grid:
    """One image's vectors by place -> the same, each attending to the places of its (shifted) window."""
    dim = next(iter(grid.values())).numel()
    depth = dim // heads
    qkv = {place: named["qkv.weight"] @ x + named["qkv.bias"] for place, x in grid.items()}
    table = named["relative_position_bias_table"]
    shifts = [shift if side > window else 0 for side in size]

    def window_of(place: tuple[int, int]) -> tuple[int, ...]:
        return tuple((at - by) // window for at, by in zip(place, shifts, strict=True))

    result = {}
    for query in grid:
        keys = [key for key in grid if window_of(key) == window_of(query)]
        parts = []
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            q = qkv[query][:dim][part]
            logits = []
            for key in keys:
                row, column = query[0] - key[0] + window - 1, query[1] - key[1] + window - 1
                bias = table[row * (2 * window - 1) + column, head]
                logits.append(q @ qkv[key][dim : 2 * dim][part] / math.sqrt(depth) + bias)
            weights = torch.stack(logits).softmax(0)
            parts.append(sum(w * qkv[key][2 * dim :][part] for w, key in zip(weights, keys, strict=True)))
        result[query] = named["proj.weight"] @ torch.cat(parts) + named["proj.bias"]
    return result


def pooled(grid: Grid, times: int) -> Grid:
    cells: dict[tuple[int, int], list[Tensor]] = {}
    for (row, column), x in grid.items():
        cells.setdefault((row // times, column // times), []).append(x)
    return {cell: torch.stack(members).mean(0) for cell, members in cells.items()}


def bilinear(grid: Grid, size: tuple[int, int], times: int, place: tuple[int, int]) -> Tensor:
    corners = []
    for at, side in zip(place, size, strict=True):
        exact = max(0.0, (at + 0.5) / times - 0.5)
        low = int(exact)
        corners.append([(low, 1 - (exact - low)), (min(low + 1, side - 1), exact - low)])
    found = [y * x * grid[row, column] for row, y in corners[0] for column, x in corners[1]]
    return sum(found[1:], found[0])


def expected(module: LocalGlobalAttention, named: Mapping[str, Tensor], image: Tensor, heads: int) -> Tensor:
    height, width, dim = image.shape
    full = {(row, column): image[row, column] for row in range(height) for column in range(width)}
    result = torch.zeros(height, width, dim, dtype=image.dtype)
    for path in range(len(module.paths)):
        times = 2**path
        size = -(-height // times), -(-width // times)
        own = {key.removeprefix(f"paths.{path}."): value for key, value in named.items()}
        shift = module.shift if path == 0 else 0
        found = attention(own, pooled(full, times), size, heads, module.window, shift)
        if times > 1:
            found = {place: bilinear(found, size, times, place) for place in full}
        result = result + torch.stack([found[place] for place in full]).view(height, width, dim)
    return result


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 10), (7, 8), (5, 7), (4, 4)], ids=str)
def test_paths_are_loops_over_queries(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    heads, dim = 2, 6
    module = LocalGlobalAttention(dim, heads, 4, 3, shift=shift).double()
    for parameter in module.parameters():
        parameter.data.normal_()
    x = torch.randn(1, *size, dim, dtype=torch.double, requires_grad=True)
    named = dict(module.named_parameters())
    found, loops = module(x), expected(module, named, x[0], heads)[None]
    torch.testing.assert_close(found, loops, rtol=1e-9, atol=1e-9)
    direction = torch.randn(found.shape, dtype=torch.double)
    inputs = [x, *named.values()]
    gradients = [torch.autograd.grad((output * direction).sum(), inputs) for output in (found, loops)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("side", [8, 12])
def test_one_path_is_timms_swin(side: int, shift: int) -> None:
    torch.manual_seed(0)
    theirs = SwinTransformerBlock(12, (side, side), 3, window_size=4, shift_size=shift).double().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)  # small logits: its mask is -100
    ours = LocalGlobalAttention(12, 3, 4, 1, shift=shift).double()
    ours.paths[0].load_state_dict(theirs.attn.state_dict())
    x = torch.randn(2, side, side, 12, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs._attn(x), rtol=1e-10, atol=1e-10)


def test_pictures_say_where_the_places_look() -> None:
    """Weights times values of the places that keys cover are the answer, where all paths have the same values."""
    torch.manual_seed(0)
    module = LocalGlobalAttention(6, 2, 4, 3, shift=2).double()
    for path in module.paths:
        path.relative_position_bias_table.data.normal_()
        path.proj.load_state_dict({"weight": torch.eye(6), "bias": torch.zeros(6)})
        path.qkv.weight.data[12:] = torch.eye(6)
    x = torch.randn(2, 7, 8, 6, dtype=torch.double)
    weights, covered, averages = module.maps(x)
    assert averages
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = (covered.double() / covered.sum(1, keepdim=True)) @ x.flatten(1, 2)
    heads = values.unflatten(-1, (2, 3)).transpose(1, 2)
    answer = (weights @ heads).transpose(1, 2).flatten(2) * 3
    torch.testing.assert_close(answer, module(x).flatten(1, 2), rtol=1e-9, atol=1e-9)
