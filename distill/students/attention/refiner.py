"""Refined attention maps: convolutions over heads and over the query-key plane (Zhou et al. 2021, "Refiner: Refining
Self-attention for Vision Transformers", arXiv 2106.03714).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.options import AttentionOptions, Grid, Key, Positive, Problem
from distill.registry import register
from distill.students.attention.base import AttentionContext, AttentionKind, AttentionMaps, head_width, without_mask
from distill.students.attention.cpu import eager_on_cpu
from distill.students.attention.refining import LEAST_IMAGES, MapNorm, refine_on_cpu


class Options(AttentionOptions):
    kind: Literal["refiner"] = Field(
        "refiner", description="Attention maps refined by convolutions (Zhou et al. 2021)."
    )
    expansion: int = Field(3, ge=1, description="Maps that are convolved, per head.")
    kernel_size: int = Field(3, ge=1, description="Side of the convolution over queries and keys, odd.")
    scale: Positive | None = Field(
        None, description="Factor of the refined maps; null: 1 / sqrt(width of a head), as published."
    )
    share: bool = Field(
        False,
        description="As published: every second of these blocks has no map of its own and refines that of the one "
        "before; the others' maps are not refined.",
    )

    def check_grid(self, grid: Grid, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check_grid(grid, recipe, at)
        if self.kernel_size % 2 == 0:
            yield Problem(((*at, "kernel_size"),), f"an odd number, got {self.kernel_size}")
        if self.share and recipe.train.gradient_checkpointing:
            yield Problem(
                (("train", "gradient_checkpointing"), (*at, "share")),
                "blocks that share maps cannot be computed again one by one; set one of the two to false",
            )


@register("attention", "refiner", Options)
class RefinerAttention(AttentionKind):
    """Attention with refined maps, in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

        A = softmax(q k^T / sqrt(d))                        of H heads, [B, H, N, N]
        X = relu6(expand_norm(expand A))                    to r H maps
        Y = relu6(depthwise_norm(depthwise X))              over the plane of queries and keys, all tokens
        A' = output_norm(reduce_norm(reduce Y) + A)         back to H maps
        output = proj(scale A' V)

    Maps and batch norms are computed in float32 at least. The norms' statistics are those of the (B, N, N) values of a
    map. `output_norm` makes the rows' sum about 0 and their variance 1, and `scale` what they weigh beside the stream.
    Parameters beside qkv and proj, with H heads and r = k = 3: 6 H^2 + 43 H; the maps cost (6 H^2 + 27 H) N^2
    multiply-adds. With three heads there are nine maps to convolve; six or twelve heads give the paper's effect room.

    With `share`, among the blocks of this kind, the first, third, ... have maps of their own, without refinement:
    A_i = softmax + A_(i-2) / sqrt(d). The others have no queries and keys, `qkv` makes values only, and they refine the
    map of the block of this kind before them, which they pass on unrefined.
    """

    def __init__(self, context: AttentionContext, options: Options) -> None:
        super().__init__()
        dim, heads = context.dim, context.num_heads
        if options.kernel_size % 2 == 0:
            raise ValueError(f"a kernel is centred on its query and key: an odd side, got {options.kernel_size}")
        self.num_heads, self.head_dim = heads, head_width(dim, heads)
        self.scale = self.head_dim**-0.5 if options.scale is None else options.scale
        self.shared = context.shared
        blocks = sorted(options.chosen(context.depth))
        place = sum(block < context.block for block in blocks)
        self.first, self.last = place == 0, place >= len(blocks) - 1
        self.shares, self.recomputable = options.share, not options.share
        self.has_map = not options.share or place % 2 == 0
        self.refines = not options.share or place % 2 == 1
        self.qkv = nn.Linear(dim, 3 * dim if self.has_map else dim, bias=context.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        if self.refines:
            maps, kernel = options.expansion * heads, options.kernel_size
            self.expand = nn.Conv2d(heads, maps, 1, bias=False)
            self.expand_norm = MapNorm(maps)
            self.depthwise = nn.Conv2d(maps, maps, kernel, padding=kernel // 2, groups=maps, bias=False)
            self.depthwise_norm = MapNorm(maps)
            self.reduce = nn.Conv2d(maps, heads, 1, bias=False)
            self.reduce_norm = MapNorm(heads)
            self.output_norm = MapNorm(heads)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, dim] -> [B, N, dim]; the other arguments come from timm's blocks and must be None and False."""
        without_mask("refiner", attn_mask, is_causal)
        weights, value = self._weights(x)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return cast(Tensor, self.proj_drop(self.proj(attended)))

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the values, [B, heads, N, N], and the values [B, heads, N, d]."""
        *query_and_key, value = self.qkv(x).unflatten(-1, (-1, self.num_heads, self.head_dim)).unbind(2)
        with torch.autocast(x.device.type, enabled=False):
            weights = self._map(*query_and_key)
            if self.refines:
                weights = self.scale * self.refine(weights)
        return weights, value.transpose(1, 2)

    def _map(self, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """The map before refinement, [B, heads, N, N], of queries and keys [B, N, heads, d] or of the block before."""
        before = None if self.first or not self.shares else self.shared.pop("refiner", None)
        if before is None and self.shares and not self.first:
            raise RuntimeError("blocks that share attention maps run one after the other, once in a forward pass")
        if query is None or key is None:
            assert before is not None
            weights = before
        else:
            query, key = (
                part.transpose(1, 2).to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key)
            )
            scale = self.head_dim**-0.5
            weights = ((query * scale) @ key.transpose(-1, -2)).softmax(-1)
            if before is not None:
                weights = weights + scale * before
        if self.shares and not self.last:
            self.shared["refiner"] = weights
        return weights

    def refine(self, weights: Tensor) -> Tensor:
        """Maps [B, heads, N, N] -> refined maps of the same shape, in float32 at least."""
        if eager_on_cpu(weights.device) and len(weights) >= LEAST_IMAGES:
            norms = (self.expand_norm, self.depthwise_norm, self.reduce_norm, self.output_norm)
            return refine_on_cpu(weights, self.expand, self.depthwise, self.reduce, norms)
        hidden = F.relu6(self.expand_norm(self.expand(weights)))
        hidden = F.relu6(self.depthwise_norm(self.depthwise(hidden)))
        return cast(Tensor, self.output_norm(self.reduce_norm(self.reduce(hidden)) + weights))

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        """What multiplies the values, which may be negative, by size: the rows of absolute values sum to 1. Blocks that
        share maps are asked one after the other."""
        weights = self._weights(x)[0][:, :, :queries].abs()
        return AttentionMaps(weights / weights.sum(-1, keepdim=True), torch.eye(x.shape[1], device=x.device))

    def initial_state(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.has_map:
            return plain
        dim = self.num_heads * self.head_dim
        return {name: tensor[-dim:] if name.startswith("qkv.") else tensor for name, tensor in plain.items()}

    def keeps_from_muon(self) -> set[str]:
        return {f"{name}.weight" for name in ("expand", "depthwise", "reduce")} if self.refines else set()
