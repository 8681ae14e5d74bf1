"""LG-Transformer: Li et al. 2021, "Local-to-Global Self-Attention in Vision Transformers" (arXiv 2107.04735).

A Swin Transformer (Liu et al. 2021, arXiv 2103.14030) whose attention has parallel paths over the map at full, half and
quarter size. Its code was never published; the published sizes fix all parameters. Not known are the pooling, the
upsampling and where windows shift: here means, bilinear, and the full-size path alone, as in Swin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from distill.options import Key, Problem
from distill.recipe.pyramids import Numbers, PyramidOptions, PyramidSize
from distill.registry import register
from distill.students.attention.base import AttentionMaps
from distill.students.attention.partition import from_windows, to_windows
from distill.students.pyramid import (
    Block,
    GridAttention,
    Pyramid,
    PyramidBuilder,
    check_stages,
    describe,
    init_linear,
    register_sizes,
)


class Options(PyramidOptions):
    family = "local_global"
    sizes: ClassVar = {
        "lg_tiny": PyramidSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 4, 7),
        "lg_small": PyramidSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 4, 7),
        # This project's, for 32 px.
        "lg_nano": PyramidSize(48, (2, 2, 2), (3, 6, 12), 2, 4),
        "lg_micro": PyramidSize(64, (2, 2, 2), (2, 4, 8), 2, 4),
        "lg_mini": PyramidSize(64, (2, 4, 2), (2, 4, 8), 2, 4),
        "lg_midi": PyramidSize(96, (2, 4, 2), (3, 6, 12), 2, 4),
    }
    models = tuple(sizes)
    paths: Numbers | None = Field(
        None,
        description="Parallel attentions in each stage's blocks, over the map at full, half, quarter size, ...; null: "
        "3, 3, 2, 1 for the published sizes, 3, 2, 1 for those of 32 px.",
    )

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        if (problem := self.stages_problem("paths", at)) is not None:
            yield problem


class LocalGlobalAttention(GridAttention):
    """The sum over paths of Up(W-MSA(Pool(x))), for maps [B, h, w, dim] of any h, w.

    Path s averages squares of 2^s x 2^s places (fewer at the map's end), attends within windows, and is upsampled.
    Places beyond the map are no keys.
    """

    def __init__(self, dim: int, num_heads: int, window: int, paths: int, *, shift: int = 0) -> None:
        """
        Args:
            paths: number of scales, each with a `qkv`, `proj` and bias table as those of timm's Swin Transformer.
            shift: by how many places the first path's windows are shifted, where the map is larger than a window.
        """
        super().__init__()
        self.window, self.shift = window, shift
        self.paths = nn.ModuleList(
            WindowAttention(dim, num_heads=num_heads, window_size=window) for _ in range(paths)
        ).apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        total = self._attend(0, x)
        for scale in range(1, len(self.paths)):
            coarse = self._attend(scale, pool(x, 2**scale))
            total = total + upsample(coarse, 2**scale)[:, :height, :width]
        return total

    def _attend(self, path: int, x: Tensor) -> Tensor:
        """Attention within the windows of one path's map."""
        height, width = x.shape[1:3]
        windows, (down, right), mask = self._windows(path, x)
        count = windows.shape[1]
        found = self.paths[path](windows.flatten(0, 1), mask).unflatten(0, (-1, count))
        found = from_windows(found, self.window, *_padded(height, width, self.window))
        if down or right:
            found = found.roll((down, right), (1, 2))
        return found[:, :height, :width]

    def _windows(self, path: int, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """The windows of the map, rolled by the shift, that shift, and which keys are hidden: [windows, Q, K] of 0 and
        -inf. Of a rolled map, the last windows hold places of both ends, which do not see each other.
        """
        height, width = x.shape[1:3]
        down, right = (self.shift if path == 0 and side > self.window else 0 for side in (height, width))
        rows, columns = _padded(height, width, self.window)
        x = F.pad(x, (0, 0, 0, columns - width, 0, rows - height)) if (rows, columns) != (height, width) else x
        if down or right:
            x = x.roll((-down, -right), (1, 2))
        mask = None
        if down or right or (rows, columns) != (height, width):
            groups = [
                _groups(*line, self.window, x.device).roll(-line[2])
                for line in ((height, rows, down), (width, columns, right))
            ]
            both = groups[0][:, None] * (columns + 2) + groups[1][None, :]
            of_windows = to_windows(both[None, :, :, None], self.window)[0, :, :, 0]
            together = of_windows[:, :, None] == of_windows[:, None, :]
            mask = torch.zeros(together.shape, dtype=x.dtype, device=x.device).masked_fill(~together, -torch.inf)
        return to_windows(x, self.window), (down, right), mask

    def maps(self, *inputs: Tensor) -> AttentionMaps:
        """Each path has an equal share of the weight; the keys of later paths cover squares of places."""
        (x,) = inputs
        height, width = x.shape[1:3]
        weights, covered = [], []
        for path in range(len(self.paths)):
            scale = 2**path
            coarse = pool(x, scale)
            rows, columns = coarse.shape[1:3]
            found = self._path_weights(path, coarse)
            batch, heads, keys, _ = found.shape
            grid = found.reshape(batch, heads * keys, rows, columns).permute(0, 2, 3, 1)
            fine = upsample(grid, scale)[:, :height, :width]
            weights.append(fine.reshape(batch, height * width, heads, keys).transpose(1, 2) / len(self.paths))
            places = torch.arange(height * width, device=x.device)
            cell = places // width // scale * columns + places % width // scale
            covered.append((cell == torch.arange(rows * columns, device=x.device)[:, None]).float())
        return AttentionMaps(torch.cat(weights, -1), torch.cat(covered), averages=True)

    def _path_weights(self, path: int, x: Tensor) -> Tensor:
        """Attention of one path over its whole map: [B, heads, keys, queries], both row by row."""
        attention: Any = self.paths[path]
        batch, height, width, _ = x.shape
        windows, (down, right), mask = self._windows(path, x)
        padded = _padded(height, width, self.window)
        number = torch.arange(padded[0] * padded[1], device=x.device).view(1, *padded, 1).roll((-down, -right), (1, 2))
        places = to_windows(number, self.window)[0, :, :, 0]
        count, area = places.shape
        qkv = attention.qkv(windows).view(batch, count, area, 3, attention.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
        logits = qkv[0] * attention.scale @ qkv[1].transpose(-1, -2) + attention._get_rel_pos_bias()
        found = (logits if mask is None else logits + mask[:, None]).softmax(-1)
        whole = found.new_zeros(batch, attention.num_heads, len(number.flatten()), len(number.flatten()))
        for window in range(count):
            here = places[window]
            whole[:, :, here[:, None], here[None, :]] = found[:, window].transpose(-1, -2)
        inside = torch.arange(whole.shape[-1], device=x.device).view(padded)[:height, :width].flatten()
        return whole[:, :, inside][..., inside]

    def no_weight_decay(self) -> set[str]:
        return {f"paths.{path}.relative_position_bias_table" for path in range(len(self.paths))}


def pool(x: Tensor, side: int) -> Tensor:
    """Means over squares of a map [B, h, w, C]: [B, ceil(h / side), ceil(w / side), C]."""
    if side == 1:
        return x
    return F.avg_pool2d(x.permute(0, 3, 1, 2), side, ceil_mode=True).permute(0, 2, 3, 1)


def upsample(x: Tensor, times: int) -> Tensor:
    """Bilinear: a map [B, h, w, C] -> [B, times * h, times * w, C]."""
    if times == 1:
        return x
    size = (x.shape[1] * times, x.shape[2] * times)
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def _padded(height: int, width: int, window: int) -> tuple[int, int]:
    return -(-height // window) * window, -(-width // window) * window


def _groups(side: int, padded: int, shift: int, window: int, device: torch.device) -> Tensor:
    """int64 [padded]: along one side, which shifted window each place belongs to; the padding to one of its own."""
    place = torch.arange(padded, device=device)
    return torch.where(place < side, (place - shift + window) // window, padded + 1)


class LocalGlobalTransformer(Pyramid):
    """LG-Transformer; stem and downsampling are those of timm's Swin Transformer."""

    def __init__(self, size: PyramidSize, *, paths: Sequence[int] | None = None, **kwargs: Any) -> None:
        """
        Args:
            paths: of each stage's blocks; None: as published, or 3, 2, 1 in three stages.

        Raises:
            ValueError: not one number of paths for each stage.
        """
        paths = paths or ((3, 3, 2, 1) if len(size.depths) == 4 else tuple(range(len(size.depths), 0, -1)))
        check_stages("paths", paths, size)

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            shift = size.window // 2 if index % 2 else 0
            attention = LocalGlobalAttention(dim, size.heads[stage], size.window, paths[stage], shift=shift)
            return Block(dim, attention, drop_path)

        super().__init__(
            stem=lambda channels, width: PatchEmbed(
                None, size.patch, channels, width, norm_layer=nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True
            ),
            downsample=lambda width: PatchMerging(width).apply(init_linear),
            block=block,
            size=size,
            **kwargs,
        )


default_cfgs = generate_default_cfgs(describe(Options.sizes, first_conv="stem.proj"))
register_sizes(LocalGlobalTransformer, Options.sizes)


@register("students", "local_global", Options)
class LocalGlobal(PyramidBuilder):
    pass
