"""One attention layer, forward and backward, with its projections and without: area attention over the paper's
summed-area tables, and over ordinary attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from distill.bench.arms import AREAS, KINDS
from distill.bench.measure import DTYPES, Arm, Machine, Row, compare
from distill.recipe import VIT_SIZES
from distill.students.attention import PatchGrid, build_attention
from distill.students.attention.area import AreaAttention, area_attention
from distill.students.plain import train_on_cpu

SIDE, PREFIX = 8, 2
"""Of the patch grid of a student with patch 4 at 32 px, and its class and distillation tokens."""
TOKENS = SIDE**2 + PREFIX
GRID: dict[str, Any] = {"grid": (SIDE, SIDE), "num_prefix_tokens": PREFIX}


def summed_area_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    max_area: int | Sequence[int],
    grid: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """Area attention as its paper computes it (Li et al. 2019, arXiv 1810.10126, section 3.3), with every area in
    memory: softmax(q . mean key / sqrt(d)) @ summed values, [B, heads, N, d] -> [B, heads, N, d].

    Args:
        max_area, grid, num_prefix_tokens: as for `distill.students.attention.area.area_attention`.
    """
    if isinstance(max_area, int):
        max_area, grid, num_prefix_tokens = (1, max_area), (1, key.shape[-2]), 0
    prefix_keys, keys = key.tensor_split([num_prefix_tokens], -2)
    prefix_values, values = value.tensor_split([num_prefix_tokens], -2)
    area_keys, _, _ = _area_features(keys.unflatten(-2, grid), max_area)
    _, _, area_values = _area_features(values.unflatten(-2, grid), max_area)
    logits = query @ torch.cat([prefix_keys, area_keys], -2).transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1) @ torch.cat([prefix_values, area_values], -2)


def _area_features(x: Tensor, max_area: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [..., H, W, d] -> mean, standard deviation and sum of every area [..., areas, d]: the authors' code makes
    all three together, whichever of them it uses.
    """
    # [..., H + 1, W + 1, d]: at (i, j) the sum of all rows before i and columns before j.
    table, squares_table = (F.pad(v.cumsum(-3).cumsum(-2), (0, 0, 1, 0, 1, 0)) for v in (x, x.square()))
    totals, squares, sizes = [], [], []
    for height in range(1, max_area[0] + 1):
        for width in range(1, max_area[1] + 1):
            totals.append(_box_sums(table, height, width))
            squares.append(_box_sums(squares_table, height, width))
            sizes.append(x.new_full((totals[-1].shape[-2], 1), height * width))
    total, size = torch.cat(totals, -2), torch.cat(sizes)
    mean = total / size
    variance = torch.cat(squares, -2) / size - mean.square()
    return mean, (variance.abs() + 1e-6).sqrt(), total


def _box_sums(table: Tensor, height: int, width: int) -> Tensor:
    """The sum over each height x width box, [..., boxes, d], of the four values at its corners."""
    below, above = table[..., height:, :, :], table[..., :-height, :, :]
    boxes = below[..., width:, :] - below[..., :-width, :] - above[..., width:, :] + above[..., :-width, :]
    return boxes.flatten(-3, -2)


class SummedArea(AreaAttention):
    """The same layer on summed-area tables."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = summed_area_attention(query, key, value, max_area=self.max_area, **GRID)
        return self.proj(attended.transpose(1, 2).flatten(2))


def measure(machine: Machine) -> Iterator[Row]:
    for model in machine.sizes:
        for precision in machine.precisions:
            where = f"{TOKENS} tokens, batch {machine.batch_size}, {precision}"
            yield from _without_projections(machine, model, precision, where)
            yield from _layers(machine, model, precision, where)
            yield from _kinds(machine, model, precision)


def _without_projections(machine: Machine, model: str, precision: str, where: str) -> Iterator[Row]:
    name = f"attention of {model} without projections, {where}"
    if not machine.wants(name):
        return
    bare = partial(_bare_arm, machine, model, precision)
    areas = [bare(arm, area_attention, max_area) for arm, max_area in AREAS.items()]
    tables = [bare(f"{arm} by tables", summed_area_attention, max_area) for arm, max_area in AREAS.items()]
    times = machine.interleave([*areas, *tables])
    for area, table in zip(areas, tables, strict=True):
        yield compare(name, times, area, table, of="speed")


def _layers(machine: Machine, model: str, precision: str, where: str) -> Iterator[Row]:
    name = f"layer of {model}, {where}"
    if not machine.wants(name):
        return
    layer = partial(layer_arm, machine, model, precision)
    plain = layer("ordinary attention", None)
    areas = [layer(arm, AreaAttention, max_area) for arm, max_area in AREAS.items()]
    tables = [layer(f"{arm} by tables", SummedArea, max_area) for arm, max_area in AREAS.items()]
    times = machine.interleave([plain, *areas, *tables])
    for area, table in zip(areas, tables, strict=True):
        yield compare(name, times, area, table, of="speed")
    for area in areas:
        yield compare(name, times, area, plain, of="time")


def _kinds(machine: Machine, model: str, precision: str) -> Iterator[Row]:
    """Other attention; on more tokens what is meant for these."""
    size = VIT_SIZES[model]
    for side, kinds in ((SIDE, list(KINDS)), (2 * SIDE, [name for name in KINDS if name != "refiner"])):
        tokens, batch = side**2 + PREFIX, machine.batch_size * SIDE**2 // side**2
        name = f"kinds of attention, layer of {model}, {tokens} tokens, batch {batch}, {precision}"
        if not machine.wants(name):
            continue
        layers = {
            arm: build_attention(dim=size.width, num_heads=size.heads, grid=(side, side), num_prefix_tokens=PREFIX,
                                 **KINDS[arm])
            for arm in kinds
        }  # fmt: skip
        plain, *others = (
            _layer_arm(machine, precision, arm, layer, (batch, tokens, size.width))
            for arm, layer in ({"ordinary attention": _ordinary(model)} | layers).items()
        )
        times = machine.interleave([plain, *others])
        for other in others:
            yield compare(name, times, other, plain, of="time")


def _bare_arm(
    machine: Machine, model: str, precision: str, name: str, attention: Callable[..., Tensor], max_area: Any
) -> Arm:
    size = VIT_SIZES[model]
    shape = machine.batch_size, size.heads, TOKENS, size.width // size.heads
    qkv = [torch.randn(shape, device=machine.device, dtype=DTYPES[precision]).requires_grad_() for _ in range(3)]
    return _arm(name, lambda: attention(*qkv, max_area=max_area, **GRID), qkv, machine.batch_size)


def layer_arm(
    machine: Machine, model: str, precision: str, name: str, kind: type[AreaAttention] | None, max_area: Any = None
) -> Arm:
    """The layer's forward and backward pass on random tokens, its images as units; without a `kind` timm's own
    attention, as it is trained here.
    """
    size = VIT_SIZES[model]
    if kind is None:
        layer = _ordinary(model)
    else:
        layer = kind(size.width, size.heads, max_area=max_area, grid=PatchGrid(SIDE, SIDE), num_prefix_tokens=PREFIX)
    return _layer_arm(machine, precision, name, layer, (machine.batch_size, TOKENS, size.width))


def _ordinary(model: str) -> nn.Module:
    size = VIT_SIZES[model]
    layer = Attention(size.width, size.heads, qkv_bias=True)
    train_on_cpu(layer)
    return layer


def _layer_arm(machine: Machine, precision: str, name: str, layer: nn.Module, shape: Sequence[int]) -> Arm:
    """Of tokens of this shape, [B, N, width]."""
    layer.to(machine.device)
    tokens = torch.randn(*shape, device=machine.device, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast(machine.device.type, DTYPES[precision], enabled=precision != "fp32"):
            output: Tensor = layer(tokens)
        return output

    return _arm(name, forward, [tokens, *layer.parameters()], shape[0])


def _arm(name: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor], batch: int) -> Arm:
    def forward_and_backward() -> None:
        forward().sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return Arm(name, forward_and_backward, batch)
