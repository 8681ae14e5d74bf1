"""Convolutional stem: Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (arXiv 2106.14881)."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from torch import nn


class ConvStem(PatchEmbed):
    """3x3 convolutions with batch norm and GELU down to the patch grid, then a 1x1 projection, in place of timm's
    PatchEmbed.

    Images [B, in_chans, H, W] -> tokens on the grid (H / patch_size) x (W / patch_size), of width embed_dim.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings:
            raise ValueError(f"a conv stem halves the image: the patch size {patch_size} is no power of 2")
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **kwargs)
        channels = _channels(embed_dim, max(halvings, 3))
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip([in_chans, *channels], channels, strict=False)):
            stride = 2 if index >= len(channels) - halvings else 1
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.GELU()))
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1, bias=bias))


def _channels(width: int, convolutions: int) -> list[int]:
    """Channels after each 3x3 convolution, the last one's being the model's width.

    Four and more double, as in the paper (patch size 16); three, for small patches of small images, rise by thirds, so
    that the first convolution, with stride 1 or 2, has enough channels (32, 64, 96 for width 96).
    """
    if convolutions > 3:
        shares = [2.0 ** (index + 1 - convolutions) for index in range(convolutions)]
    else:
        shares = [(index + 1) / convolutions for index in range(convolutions)]
    return [*(max(8, round(width * share / 8) * 8) for share in shares[:-1]), width]
