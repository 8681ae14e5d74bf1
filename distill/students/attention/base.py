"""What the kinds of attention share: how a kind is found by its name, and the grid that 2-D kinds look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

KINDS: dict[str, type[nn.Module]] = {}
"""Every kind by its name in a recipe (`student.attention.kind`). A kind is built as
`kind(dim, num_heads, qkv_bias=..., grid=PatchGrid, num_prefix_tokens=..., **the recipe's other keys)`, maps tokens
[B, N, dim] to [B, N, dim], and names its projections `qkv` and `proj` as timm's Attention does, so that weights fit."""

Kind = TypeVar("Kind", bound=type[nn.Module])


def attention_kind(name: str) -> Callable[[Kind], Kind]:
    """Class decorator that makes an attention module available to recipes as `name`."""

    def add(kind: Kind) -> Kind:
        KINDS[name] = kind
        return kind

    return add


class PatchGrid:
    """Height and width, in patches, of the images on their way through a model.

    One model and its attention modules share one grid: the model sets it where it embeds the patches, since timm's
    blocks pass on tokens only. It is no part of any state dict.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width
