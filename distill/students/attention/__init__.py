"""Attention kinds, one per file. `base.py` has the interface."""

from __future__ import annotations

from typing import Any

from distill import registry
from distill.students.attention.base import AttentionContext, AttentionKind, AttentionMaps, PatchGrid

__all__ = ["AttentionContext", "AttentionKind", "AttentionMaps", "PatchGrid", "build_attention"]


def build_attention(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    qkv_bias: bool = True,
    **options: Any,
) -> AttentionKind:
    """An attention module by name: tokens [B, num_prefix_tokens + H * W, dim] -> the same shape.

    Args:
        grid: (H, W) of the patches, for kinds that need it.
        options: of the kind, as under `student.attention` in a recipe.

    Raises:
        InputError: no such kind.
        ValueError: invalid options.
    """
    variant = registry.find("attention", kind)
    context = AttentionContext(
        dim=dim,
        num_heads=num_heads,
        qkv_bias=qkv_bias,
        grid=None if grid is None else PatchGrid(*grid),
        num_prefix_tokens=num_prefix_tokens,
    )
    module: AttentionKind = variant.implementation.build(
        context, variant.options.model_validate({"kind": kind, **options})
    )
    return module
