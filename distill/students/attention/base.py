"""The interface of attention kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class PatchGrid:
    """Height and width, in patches, of the current images.

    A model and its attention modules share one instance. The model sets it when it embeds patches, since timm's blocks
    receive tokens only. It is not part of the state dict.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width


class SharedState(dict[str, Any]):
    """State shared by the blocks of a model. A type of its own, because `torch.export` leaves copies of the plain dicts
    that a model's modules have.
    """


@dataclass(frozen=True)
class AttentionContext:
    """Arguments of an attention module in a model."""

    dim: int
    num_heads: int
    qkv_bias: bool = True
    grid: PatchGrid | None = None
    num_prefix_tokens: int = 0
    block: int = 0
    """Index of its block, from 0."""
    depth: int = 1
    """Of the model, in blocks."""
    shared: SharedState = field(default_factory=SharedState)
    """State shared by the blocks of a model during one forward pass; empty at its beginning."""


class AttentionMaps(NamedTuple):
    """Attention weights, for pictures."""

    weights: Tensor
    """[B, heads, queries, K], rows summing to 1."""
    covered: Tensor
    """float32 [K, tokens]: 1 where a key covers a token; the token's weight in its value where these are learned."""
    averages: bool = False
    """Whether a key's value is the mean of its tokens' values, not their sum."""

    @property
    def shares(self) -> Tensor:
        """[K, tokens]: what a token's value weighs in a key's."""
        return self.covered / self.covered.sum(1, keepdim=True) if self.averages else self.covered


class AttentionKind(nn.Module):
    """Self-attention in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

    It names its projections `qkv` and `proj` as timm's Attention does, so that weights fit, and has `proj_drop`.
    """

    proj_drop: nn.Module
    recomputable = True
    """Whether its block can be computed again alone, for gradient checkpointing."""

    @classmethod
    def build(cls, context: AttentionContext, options: Any) -> AttentionKind:
        """One module, from the options of a recipe."""
        return cls(context, options)

    def maps(self, x: Tensor, queries: int) -> AttentionMaps | None:
        """Attention of the first `queries` of the tokens x [B, N, dim]; None: this kind has no such weights."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of its parameters without weight decay, besides biases and norms."""
        return set()

    def keeps_from_muon(self) -> set[str]:
        """Names of its matrices that are none between hidden layers: with Muon they are AdamW's."""
        return set()

    def initial_state(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of timm's attention, initialised or trained, it starts with; `plain`: its state by name."""
        return plain

    def after_step(self, passes: int) -> None:
        """Called after each optimizer step, outside compiled code, with the number of forward passes of it."""

    def not_averaged(self) -> set[str]:
        """Names of floating-point buffers that moving averages of the weights copy instead."""
        return set()


def head_width(dim: int, num_heads: int) -> int:
    """Of each head. Raises ValueError if they do not divide the width."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
    return dim // num_heads


def named_in(model: nn.Module, kind: type[nn.Module], method: str) -> set[str]:
    """Names, in the model, of what its modules of this class name by a method: parameters or buffers."""
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, kind)
        for own in getattr(module, method)()
    }


def without_mask(kind: str, attn_mask: Tensor | None, is_causal: bool) -> None:
    """ValueError for the arguments that timm's blocks give to attention with a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError(f"{kind} attention takes no mask")
