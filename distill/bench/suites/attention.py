"""One attention layer, forward and backward, with its projections and without: area attention over the paper's
summed-area tables, and over ordinary attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from distill.bench.machine import DTYPES, Machine
from distill.bench.measure import Arm, Goal, Row, compare, interleave
from distill.bench.summed_area import summed_area_attention
from distill.recipe.sizes import VIT_SIZES
from distill.students.attention.area import AreaAttention, area_attention
from distill.students.attention.base import PatchGrid
from distill.students.plain import train_on_cpu

SIDE, PREFIX = 8, 2
"""Of the patch grid of a student with patch 4 at 32 px, and its class and distillation tokens."""
AREAS: dict[str, Mapping[str, Any]] = {
    "areas of 2": {"max_area": 2},
    "areas of 4": {"max_area": 4},
    "areas of 2x2": {"max_area": [2, 2]},
}


class SummedArea(AreaAttention):
    """The same layer on summed-area tables."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = summed_area_attention(
            query, key, value, max_area=self.max_area, grid=(SIDE, SIDE), num_prefix_tokens=PREFIX
        )
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))


def measure(machine: Machine) -> Iterator[Row]:
    batch = 1024 if machine.device.type == "cuda" else 128
    for model in machine.sizes:
        for precision in machine.precisions:
            yield from _without_projections(machine, model, precision, batch)
            plain = layer_arm(machine, model, precision, batch, "ordinary attention", None)
            areas = [layer_arm(machine, model, precision, batch, name, AreaAttention, **AREAS[name]) for name in AREAS]
            tables = [
                layer_arm(machine, model, precision, batch, f"{name} by tables", SummedArea, **AREAS[name])
                for name in AREAS
            ]
            times = interleave([plain, *areas, *tables], machine.device, **machine.rounds)
            where = f"layer of {model}, {SIDE**2 + PREFIX} tokens, batch {batch}, {precision}"
            for table, area in zip(tables, areas, strict=True):
                yield compare(where, times, area, table, of="speed", goal=Goal(">=", 5))
            for area in areas:
                yield compare(where, times, area, plain, of="time")


def _without_projections(machine: Machine, model: str, precision: str, batch: int) -> Iterator[Row]:
    size = VIT_SIZES[model]
    shape = batch, size.heads, SIDE**2 + PREFIX, size.width // size.heads
    sources = [torch.randn(shape, device=machine.device, dtype=DTYPES[precision]).requires_grad_() for _ in range(3)]

    def arm(name: str, attention: Callable[..., Tensor], options: Mapping[str, Any]) -> Arm:
        def forward_and_backward() -> None:
            attention(*sources, grid=(SIDE, SIDE), num_prefix_tokens=PREFIX, **options).sum().backward()
            for source in sources:
                source.grad = None

        return Arm(name, forward_and_backward, batch)

    areas = [arm(name, area_attention, options) for name, options in AREAS.items()]
    tables = [arm(f"{name} by tables", summed_area_attention, options) for name, options in AREAS.items()]
    times = interleave([*areas, *tables], machine.device, **machine.rounds)
    for area, table in zip(areas, tables, strict=True):
        where = f"attention of {model} without projections, {SIDE**2 + PREFIX} tokens, batch {batch}, {precision}"
        yield compare(where, times, area, table, of="speed")


def attention_layer(width: int, heads: int, kind: type[AreaAttention] | None, **options: Any) -> nn.Module:
    """A layer of that width; None: timm's own, as it is trained here."""
    if kind is None:
        plain = Attention(width, heads, qkv_bias=True)
        train_on_cpu(plain)
        return plain
    return kind(width, heads, grid=PatchGrid(SIDE, SIDE), num_prefix_tokens=PREFIX, **options)


def layer_arm(
    machine: Machine,
    model: str,
    precision: str,
    batch: int,
    name: str,
    kind: type[AreaAttention] | None,
    **options: Any,
) -> Arm:
    """The layer's forward and backward pass on random tokens, its images as units."""
    size = VIT_SIZES[model]
    layer = attention_layer(size.width, size.heads, kind, **options).to(machine.device)
    tokens = torch.randn(batch, SIDE**2 + PREFIX, size.width, device=machine.device, requires_grad=True)

    def forward_and_backward() -> None:
        with torch.autocast(machine.device.type, DTYPES[precision], enabled=precision != "fp32"):
            output = layer(tokens)
        output.sum().backward()
        layer.zero_grad()
        tokens.grad = None

    return Arm(name, forward_and_backward, batch)
