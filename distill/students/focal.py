"""Focal Transformer: Yang et al. 2021, "Focal Self-attention for Local-Global Interactions in Vision Transformers"
(arXiv 2107.00641).

Tokens attend to their window, to the ring of tokens around it and to pooled windows farther away. No positions but the
biases of attention, no shifted windows. Other than in the published code, whose faults `FocalWindows` lists, keys are
on the map and there once: the published sizes have fewer parameters by those of the repeated keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from distill.options import Key, Problem
from distill.recipe.pyramids import Numbers, PyramidOptions, PyramidSize
from distill.registry import register
from distill.students.attention.base import AttentionMaps
from distill.students.attention.windows import FocalWindows
from distill.students.pyramid import (
    Block,
    GridAttention,
    Pyramid,
    PyramidBuilder,
    check_stages,
    describe,
    register_sizes,
)


class Options(PyramidOptions):
    family = "focal"
    sizes: ClassVar = {
        "focal_tiny": PyramidSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 4, 7),
        "focal_small": PyramidSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 4, 7),
        "focal_base": PyramidSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 4, 7),
        # This project's, for 32 px.
        "focal_nano": PyramidSize(48, (2, 2, 2), (3, 6, 12), 2, 4),
        "focal_micro": PyramidSize(64, (2, 2, 2), (2, 4, 8), 2, 4),
        "focal_mini": PyramidSize(64, (2, 4, 2), (2, 4, 8), 2, 4),
        "focal_midi": PyramidSize(96, (2, 6, 2), (3, 6, 12), 2, 4),
    }
    models = tuple(sizes)
    expand: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        None,
        description="Width of the ring around a window, in places of the grid; the last stage has none; null: half of "
        "the window.",
    )
    focal_windows: Numbers | None = Field(
        None,
        description="In each stage, side of the square of pooled windows around a window, odd; null: 7, 5, 3, 1 for "
        "the published sizes, 3, 3, 1 for those of 32 px.",
    )

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        if (problem := self.stages_problem("focal_windows", at)) is not None:
            yield problem
        elif even := [side for side in self.focal_windows or () if side % 2 == 0]:
            yield Problem(((*at, "focal_windows"),), f"odd numbers of windows a side, got {even[0]}")


class FocalAttention(FocalWindows, GridAttention):
    """Focal self-attention of a map, after its norm: [B, h, w, dim] -> [B, h, w, dim], for any h and w."""

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        return self.attend(x.flatten(1, 2), (height, width)).view(x.shape)

    def maps(self, *inputs: Tensor) -> AttentionMaps:
        """Of every place; the pooled windows cover theirs by the learned weights."""
        (x,) = inputs
        _, height, width, _ = x.shape
        return self.maps_of(x.flatten(1, 2), (height, width))


class FocalTransformer(Pyramid):
    """Focal Transformer; the downsampling is a 2x2 convolution with stride 2 and a norm, as the stem's is."""

    def __init__(
        self, size: PyramidSize, *, expand: int | None = None, focal_windows: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            expand: width of the ring around windows, in all stages but the last; None: half of the window.
            focal_windows: of each stage; None: as published, or 3 in all stages but the last, with 1.

        Raises:
            ValueError: not one focal window for each stage, or an even one.
        """
        stages = len(size.depths)
        sides = focal_windows or ((7, 5, 3, 1) if stages == 4 else (*[3] * (stages - 1), 1))
        check_stages("focal_windows", sides, size)
        ring = size.window // 2 if expand is None else expand

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            around = ring if stage < stages - 1 else 0
            return Block(dim, FocalAttention(dim, size.heads[stage], size.window, around, sides[stage]), drop_path)

        super().__init__(
            stem=lambda channels, width: _patches(size.patch, channels, width),
            downsample=_Between,
            block=block,
            size=size,
            **kwargs,
        )


def _patches(side: int, channels: int, width: int) -> PatchEmbed:
    """Convolution over squares and a norm: [B, channels, H, W] -> [B, ceil(H / side), ceil(W / side), width]."""
    return PatchEmbed(None, side, channels, width, norm_layer=nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True)


class _Between(nn.Module):
    """A map [B, h, w, dim] -> [B, ceil(h / 2), ceil(w / 2), 2 * dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patches = _patches(2, dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.patches(x.permute(0, 3, 1, 2))
        return found


default_cfgs = generate_default_cfgs(describe(Options.sizes, first_conv="stem.proj"))
register_sizes(FocalTransformer, Options.sizes)


@register("students", "focal", Options)
class Focal(PyramidBuilder):
    pass
