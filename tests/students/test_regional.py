"""RegionViT's block against loops over windows and queries, its downsampling, and whole windows of ragged maps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from distill.students.regional import Downsample, RegionalBlock

Place = tuple[int, int]


def norm(named: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / torch.sqrt((centred * centred).mean() + 1e-6)
    return scaled * named[f"{name}.weight"] + named[f"{name}.bias"]


def attend(
    named: Mapping[str, Tensor], tokens: list[Tensor], places: list[Place | None], heads: int, window: int
) -> list[Tensor]:
    """Tokens -> what their attention to one another gives; with a bias where both have a place."""
    dim = tokens[0].numel()
    depth = dim // heads
    qkv = [named["qkv.weight"] @ token + named["qkv.bias"] for token in tokens]
    result = []
    for query, at in zip(qkv, places, strict=True):
        parts = []
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            logits = []
            for key, there in zip(qkv, places, strict=True):
                logit = query[:dim][part] @ key[dim : 2 * dim][part] / math.sqrt(depth)
                if at is not None and there is not None:
                    logit = (
                        logit + named["bias_local"][head, at[0] - there[0] + window - 1, at[1] - there[1] + window - 1]
                    )
                logits.append(logit)
            weights = torch.stack(logits).softmax(0)
            parts.append(sum(w * key[2 * dim :][part] for w, key in zip(weights, qkv, strict=True)))
        result.append(named["proj.weight"] @ torch.cat(parts) + named["proj.bias"])
    return result


def block(
    named: Mapping[str, Tensor], regional: Tensor, local: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor]:
    """One image's regional [Hr, Wr, dim] and local [h, w, dim] tokens after a block."""
    rows, columns, _ = regional.shape
    height, width, _ = local.shape
    regions = [(row, column) for row in range(rows) for column in range(columns)]
    before = [regional[place] for place in regions]
    normed = [norm(named, "norm_regional", token) for token in before]
    among = attend(named, normed, [None] * len(regions), heads, window)
    new_regional, new_local = {}, {}
    for (row, column), token, more in zip(regions, before, among, strict=True):
        inside = [
            (y, x)
            for y in range(row * window, min((row + 1) * window, height))
            for x in range(column * window, min((column + 1) * window, width))
        ]
        tokens = [token + more, *(local[place] for place in inside)]
        normed = [norm(named, "norm_local", token) for token in tokens]
        seen = attend(named, normed, [None, *inside], heads, window)
        tokens = [token + more for token, more in zip(tokens, seen, strict=True)]
        after = []
        for token in tokens:
            hidden = named["fc1.weight"] @ norm(named, "norm_mlp", token) + named["fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            after.append(token + named["fc2.weight"] @ hidden + named["fc2.bias"])
        new_regional[row, column] = after[0]
        new_local |= dict(zip(inside, after[1:], strict=True))
    places = [(y, x) for y in range(height) for x in range(width)]
    return (
        torch.stack([new_regional[place] for place in regions]).view(regional.shape),
        torch.stack([new_local[place] for place in places]).view(local.shape),
    )


@pytest.mark.parametrize("size", [(8, 10), (7, 8), (7, 10), (5, 7), (8, 8), (3, 4)], ids=str)
def test_a_block_is_loops_over_windows_and_queries(size: Place) -> None:
    torch.manual_seed(0)
    heads, dim, window = 2, 6, 4
    module = RegionalBlock(dim, heads, window, mlp_ratio=2.0).double()
    named = dict(module.named_parameters())
    for parameter in named.values():
        parameter.data.normal_()
    local = torch.randn(1, *size, dim, dtype=torch.double, requires_grad=True)
    regional = torch.randn(1, *(-(-side // window) for side in size), dim, dtype=torch.double, requires_grad=True)
    found = module(regional, local)
    loops = [one[None] for one in block(named, regional[0], local[0], heads, window)]
    torch.testing.assert_close(list(found), loops, rtol=1e-9, atol=1e-9)
    directions = [torch.randn(one.shape, dtype=torch.double) for one in found]
    inputs = [regional, local, *named.values()]
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(outputs, directions, strict=True)), inputs)
        for outputs in (found, loops)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    module = RegionalBlock(6, 2, 4).double()
    regional, local = (torch.randn(3, *size, 6, dtype=torch.double) for size in ((2, 2), (7, 8)))
    whole = module(regional, local)
    for image in range(3):
        alone = module(regional[image : image + 1], local[image : image + 1])
        torch.testing.assert_close([one[image : image + 1] for one in whole], list(alone))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)], ids=str)
def test_downsampling_is_a_convolution_of_each_channel(size: Place) -> None:
    torch.manual_seed(0)
    module = Downsample(3).double()
    for parameter in module.parameters():
        parameter.data.normal_()
    x = torch.randn(1, 3, *size, dtype=torch.double)
    found = module(x)
    height, width = size
    assert found.shape == (1, 6, -(-height // 2), -(-width // 2))
    centred = x - x.mean(1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)
    y = y * module.norm.weight.view(-1, 1, 1) + module.norm.bias.view(-1, 1, 1)
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    for channel in range(6):
        for row in range(found.shape[2]):
            for column in range(found.shape[3]):
                total = module.conv.bias[channel]
                for i in range(3):
                    for j in range(3):
                        at = 2 * row + i - 1, 2 * column + j - 1
                        if 0 <= at[0] < height and 0 <= at[1] < width:
                            total = total + module.conv.weight[channel, 0, i, j] * y[0, channel // 2, at[0], at[1]]
                torch.testing.assert_close(found[0, channel, row, column], total)


def test_pictures_say_where_regional_tokens_look() -> None:
    """With the identity as values and projection, keys' means over what they cover are both attentions' answers."""
    torch.manual_seed(0)
    module = RegionalBlock(6, 2, 4).double()
    module.bias_local.data.normal_()
    regional, local = (torch.randn(2, *size, 6, dtype=torch.double) for size in ((2, 3), (7, 10)))
    weights, covered, averages = module.maps(regional, local)
    assert weights.shape == (2, 2, 6, 6 + 70)
    assert averages
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert covered[:6].sum(1).tolist() == [16, 16, 8, 12, 12, 6]
    assert covered[6:].equal(torch.eye(70))
    # A regional token sees the local ones of its own window only.
    assert ((weights[..., 6:].mean((0, 1)) > 0) == (covered[:6] > 0)).all()
