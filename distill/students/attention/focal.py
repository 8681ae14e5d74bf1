"""Focal attention in a flat vision transformer (Yang et al. 2021, arXiv 2107.00641): fine tokens nearby, pooled windows
farther away, and the prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from distill.options import AttentionOptions, Grid, Key, Problem
from distill.registry import register
from distill.students.attention.base import AttentionContext, AttentionKind, AttentionMaps, PatchGrid, without_mask
from distill.students.attention.windows import FocalWindows


class Options(AttentionOptions):
    kind: Literal["focal"] = Field(
        "focal", description="Windows, rings around them and pooled windows (Yang et al. 2021)."
    )
    window: int = Field(2, ge=1, description="Side of a window, in patches.")
    expand: int = Field(1, ge=0, description="Width of the ring around a window, in patches.")
    focal_window: int = Field(3, ge=1, description="Side of the square of pooled windows around a window, odd.")

    def check_grid(self, grid: Grid, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check_grid(grid, recipe, at)
        if self.focal_window % 2 == 0:
            yield Problem(((*at, "focal_window"),), f"an odd number of windows a side, got {self.focal_window}")
        if grid.side is None:
            return
        limits = {"window": (1, self.window), "expand": (0, self.expand)}
        for key, (least, value) in limits.items():
            if value > grid.side:
                involved = ((*at, key), ("student", "patch_size"), ("data", "resolution"))
                side = grid.side
                yield Problem(involved, f"from {least} to the side of the {side}x{side} patch grid, got {value}")


@register("attention", "focal", Options)
class FocalTokens(FocalWindows, AttentionKind):
    """Focal attention of the patches, in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

    A patch's query sees its window, the ring around it, the pooled windows and the prefix tokens, these without bias,
    under one softmax. The prefix tokens' queries see all tokens, and no pooled windows. Parameters beside qkv and proj,
    with H heads, windows of w, rings of R tokens and f pooled windows a side:
    w^2 + 1 + H ((2w - 1)^2 + w^2 R + (w + f - 1)^2), at H = 3, w = 2, R = 12 and f = 3: 224.
    """

    def __init__(self, context: AttentionContext, options: Options) -> None:
        super().__init__(
            context.dim,
            context.num_heads,
            options.window,
            options.expand,
            options.focal_window,
            qkv_bias=context.qkv_bias,
        )
        if context.grid is None:
            raise ValueError("windows lie on a grid: give grid=(height, width)")
        self.grid: PatchGrid = context.grid
        self.num_prefix_tokens = context.num_prefix_tokens

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, dim] -> [B, N, dim]; the other arguments come from timm's blocks and must be None and False."""
        without_mask("focal", attn_mask, is_causal)
        height, width = self.grid.height, self.grid.width
        if x.shape[1] != self.num_prefix_tokens + height * width:
            raise ValueError(
                f"{self.num_prefix_tokens} prefix tokens and a grid of {height}x{width} are not {x.shape[1]} tokens"
            )
        return self.attend(x, (height, width))

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        """Keys: all tokens and, for patches' queries, the pooled windows after them, which cover their tokens by the
        learned weights."""
        count, prefix = x.shape[1], self.num_prefix_tokens
        maps = self.maps_of(x, (self.grid.height, self.grid.width), queries)
        if queries <= prefix:  # no pooled windows
            return maps._replace(weights=maps.weights[..., :count], covered=maps.covered[:count])
        return maps
