"""What every attention kind is given and gives, and the grid that 2-D kinds look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class PatchGrid:
    """Height and width, in patches, of the images on their way through a model.

    One model and its attention modules share one grid: the model sets it where it embeds the patches, since timm's
    blocks pass on tokens only. It is no part of any state dict.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width


@dataclass(frozen=True)
class AttentionContext:
    """Where in a model an attention module stands."""

    dim: int
    num_heads: int
    qkv_bias: bool = True
    grid: PatchGrid | None = None
    num_prefix_tokens: int = 0
    block: int = 0
    """Number of its block, from 0."""
    depth: int = 1
    """Of the model, in blocks."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What the blocks of one model share within one forward pass; empty when it begins."""


class AttentionMaps(NamedTuple):
    """Where tokens look, for pictures."""

    weights: Tensor
    """[B, heads, queries, K], rows summing to 1."""
    covered: Tensor
    """float32 [K, tokens]: 1 where a key covers a token."""
    averages: bool = False
    """Whether the value of a key is the mean of its tokens' values, not their sum."""


class AttentionKind(nn.Module):
    """Self-attention in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

    It names its projections `qkv` and `proj` as timm's Attention does, so that weights fit, and has `proj_drop`.
    """

    proj_drop: nn.Module

    @classmethod
    def build(cls, context: AttentionContext, options: Any) -> AttentionKind:
        """One module, from the options of a recipe."""
        return cls(context, options)

    def maps(self, x: Tensor, queries: int) -> AttentionMaps | None:
        """Where the first `queries` of the tokens x [B, N, dim] look; None where this kind has no such weights."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of its parameters without weight decay, besides biases and norms."""
        return set()
