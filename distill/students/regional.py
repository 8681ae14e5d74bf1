"""RegionViT: Chen et al. 2022, "RegionViT: Regional-to-Local Attention for Vision Transformers" (arXiv 2106.02689).

Beside the map of local tokens goes one of regional tokens, one for each window. In a block the regional tokens attend
to one another, then each window's regional and local tokens to themselves; regional tokens are classified.

Other than in the published code, maps that windows do not divide are masked right in all of their windows, and images
are padded at the bottom and on the right for both maps. There the bias of query q and key k is at another place of its
table: weights fit after re-indexing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from distill.recipe.pyramids import PyramidOptions, PyramidSize
from distill.registry import register
from distill.students.attention.base import AttentionMaps
from distill.students.attention.partition import from_windows, offsets, padding, to_windows
from distill.students.pyramid import (
    GridAttention,
    Pyramid,
    PyramidBuilder,
    Stream,
    describe,
    init_linear,
    register_sizes,
)


class Options(PyramidOptions):
    family = "regional"
    sizes: ClassVar = {
        "regionvit_tiny": PyramidSize(64, (2, 2, 8, 2), (2, 4, 8, 16), 4, 7),
        "regionvit_small": PyramidSize(96, (2, 2, 8, 2), (3, 6, 12, 24), 4, 7),
        "regionvit_medium": PyramidSize(96, (2, 2, 14, 2), (3, 6, 12, 24), 4, 7),
        "regionvit_base": PyramidSize(128, (2, 2, 14, 2), (4, 8, 16, 32), 4, 7),
        # This project's, for 32 px.
        "regionvit_nano": PyramidSize(48, (2, 2, 2), (3, 6, 12), 2, 4),
        "regionvit_micro": PyramidSize(64, (2, 2, 2), (2, 4, 8), 2, 4),
        "regionvit_mini": PyramidSize(64, (2, 4, 2), (2, 4, 8), 2, 4),
        "regionvit_midi": PyramidSize(96, (2, 4, 2), (3, 6, 12), 2, 4),
    }
    models = tuple(sizes)

    def step(self, size: PyramidSize) -> tuple[int, str]:
        return size.patch * size.window, f"the regions of {size.window}x{size.window} patches of {size.patch} px, so by"


class RegionalBlock(GridAttention):
    """Regional-to-local attention and an MLP: regional tokens [B, ceil(h / window), ceil(w / window), dim] and local
    tokens [B, h, w, dim], of any h, w -> both.

        r = R + attention(norm_regional(R)), over all regional tokens, without bias;
        of each window t = [r; its local tokens]: t += attention(norm_local(t)), t += MLP(norm_mlp(t)),

    with one attention's projections for both, and a bias by offset between local tokens. Places beyond the map are no
    keys.
    """

    relative: Tensor

    def __init__(
        self, dim: int, num_heads: int, window: int, mlp_ratio: float = 4.0, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm_regional = nn.LayerNorm(dim, eps=1e-6)
        self.norm_local = nn.LayerNorm(dim, eps=1e-6)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_local = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1))
        self.register_buffer("relative", offsets(window), persistent=False)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(init_linear)
        trunc_normal_(self.bias_local, std=0.02)

    def forward(self, regional: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        height, width = local.shape[1:3]
        batch, rows, columns, dim = regional.shape
        r = regional.reshape(batch, 1, rows * columns, dim)
        r = r + self.drop_path(self._attend(self.norm_regional(r), None))
        tokens = torch.cat([r.transpose(1, 2), to_windows(local, self.window)], 2)
        tokens = tokens + self.drop_path(self._attend(self.norm_local(tokens), self._bias(height, width)))
        tokens = tokens + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm_mlp(tokens)))))
        return (
            tokens[:, :, 0].unflatten(1, (rows, columns)),
            from_windows(tokens[:, :, 1:], self.window, height, width),
        )

    def _bias(self, height: int, width: int) -> Tensor:
        """What is added to the logits within windows: [1 or windows, heads, 1 + window^2, 1 + window^2]."""
        bias = F.pad(self.bias_local.flatten(1)[:, self.relative], (1, 0, 1, 0))[None]
        beyond = padding(height, width, self.window, bias.device)
        return bias if beyond is None else bias.masked_fill(F.pad(beyond, (1, 0))[:, None, None], -torch.inf)

    def _weights(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each group of tokens [B, groups, N, dim]: attention [B, groups, heads, N, N], and values."""
        batch, groups, number, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, groups, number, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return (logits if bias is None else logits + bias).softmax(-1), value

    def _attend(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        weights, value = self._weights(tokens, bias)
        return self.proj((weights @ value).transpose(2, 3).flatten(3))

    def maps(self, *inputs: Tensor) -> AttentionMaps:
        """Of the regional tokens: half of the weight is that among them, whose keys cover windows, and half that within
        the window of each.
        """
        regional, local = inputs
        height, width = local.shape[1:3]
        batch, rows, columns, dim = regional.shape
        r = regional.reshape(batch, 1, rows * columns, dim)
        among, _ = self._weights(self.norm_regional(r), None)
        r = r + self._attend(self.norm_regional(r), None)
        tokens = torch.cat([r.transpose(1, 2), to_windows(local, self.window)], 2)
        within = self._weights(self.norm_local(tokens), self._bias(height, width))[0][:, :, :, 0]  # [B, n, H, 1 + w^2]
        count = rows * columns
        places = torch.arange(height * width, device=local.device)
        own = places // width // self.window * columns + places % width // self.window
        covered = (own == torch.arange(count, device=local.device)[:, None]).float()
        inside = from_windows(
            torch.arange(count * self.window**2, device=local.device).view(1, count, -1, 1), self.window, height, width
        ).flatten()
        locals_ = within.new_zeros(batch, self.num_heads, count, count, self.window**2)
        each = torch.arange(count, device=local.device)
        locals_[:, :, each, each] = within[..., 1:].transpose(1, 2)
        to_regions = among[:, 0] + torch.diag_embed(within[..., 0].transpose(1, 2))
        weights = torch.cat([to_regions, locals_.flatten(3)[..., inside]], -1) / 2
        return AttentionMaps(weights, torch.cat([covered, torch.eye(height * width, device=local.device)]), True)

    def no_weight_decay(self) -> set[str]:
        return {"bias_local"}


class Downsample(nn.Module):
    """Norm over channels, GELU, and a 3x3 convolution of each channel into two with stride 2: [B, dim, h, w] -> [B,
    2 * dim, ceil(h / 2), ceil(w / 2)].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.gelu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class Between(Downsample):
    """One `Downsample` for both maps [B, h, w, dim] of a stage."""

    def forward(self, stream: Any) -> Any:
        return tuple(super(Between, self).forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for x in stream)


class Stem(nn.Module):
    """Images -> regional tokens, from the pixels of their windows, and local tokens, from overlapping patches."""

    def __init__(self, in_chans: int, width: int, size: PyramidSize, convolutions: bool) -> None:
        """
        Args:
            convolutions: three of 3x3 for the local tokens, instead of one of twice the patches' side.
        """
        super().__init__()
        patch = size.patch
        self.region = patch * size.window
        self.regional = nn.Conv2d(in_chans, width, self.region, self.region)
        self.local: nn.Module = nn.Conv2d(in_chans, width, 2 * patch, patch, padding=patch - 1)
        if convolutions:
            quarter, half = width // 4, width // 2
            self.local = nn.Sequential(
                nn.Conv2d(in_chans, quarter, 3, 2, 1), LayerNorm2d(quarter), nn.GELU(),
                nn.Conv2d(quarter, half, 3, 2, 1), LayerNorm2d(half), nn.GELU(),
                nn.Conv2d(half, width, 3, 1, 1),
            )  # fmt: skip
        self.patch = patch

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        regional, local = self.regional(_padded(x, self.region)), self.local(_padded(x, self.patch))
        return regional.permute(0, 2, 3, 1), local.permute(0, 2, 3, 1)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Images with zeros at the bottom and on the right, so that `multiple` divides their sides."""
    below, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, below)) if below or right else x


class RegionVit(Pyramid):
    """RegionViT. Feature maps are those of the local tokens."""

    def __init__(self, size: PyramidSize, *, convolutions: bool = False, **kwargs: Any) -> None:
        """
        Args:
            convolutions: of the stem, see `Stem`.
        """

        def block(stage: int, index: int, dim: int, drop_path: float) -> RegionalBlock:
            return RegionalBlock(dim, size.heads[stage], size.window, drop_path=drop_path)

        super().__init__(
            stem=lambda channels, width: Stem(channels, width, size, convolutions),
            downsample=Between,
            block=block,
            size=size,
            norm_eps=1e-6,
            **kwargs,
        )

    def map_of(self, x: Stream) -> Tensor:
        return x[1]

    def answer_of(self, x: Stream) -> Tensor:
        return x[0]


WITH_CONVOLUTIONS = ("regionvit_tiny", "regionvit_small")
default_cfgs = generate_default_cfgs(
    {
        name: cfg | {"first_conv": ("stem.local.0" if name in WITH_CONVOLUTIONS else "stem.local", "stem.regional")}
        for name, cfg in describe(Options.sizes, first_conv="").items()
    }
)
register_sizes(RegionVit, Options.sizes, {name: {"convolutions": True} for name in WITH_CONVOLUTIONS})


@register("students", "regional", Options)
class Regional(PyramidBuilder):
    pass
