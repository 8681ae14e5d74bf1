"""Refiner-ViT at its published sizes, registered with timm as `refiner_vit_s`, `refiner_vit_m` and `refiner_vit_l`
(Zhou et al. 2021, "Refiner: Refining Self-attention for Vision Transformers", arXiv 2106.03714).

With 1,000 classes at 224 px they have 25,023,656, 55,029,932 and 80,637,192 parameters; published accuracies on
ImageNet are 83.6, 84.6 and 84.9 %. The dense head over all patches, which the authors train beside the class head, is
left out.
For the same attention in other sizes see the kind `refiner`.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import LayerScale, PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from distill.students.vit import AttentionVisionTransformer


class Stem(PatchEmbed):
    """Three convolutions at half of the resolution, and patches of 8 of these: images [B, in_chans, H, W] -> tokens of
    16 x 16 pixels.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 384, **kwargs: Any
    ) -> None:
        if patch_size != 16:
            raise ValueError(f"the stem has patches of 16 pixels, got patch_size={patch_size}")
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        layers: list[nn.Module] = []
        for before, after, kernel, stride in ((in_chans, 32, 7, 2), (32, 64, 3, 1), (64, 128, 3, 1)):
            convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
        self.proj = nn.Sequential(*layers, nn.Conv2d(128, embed_dim, 8, 8))


class DoubledBlock(Block):
    """timm's block with halved inputs and doubled branches: x + 2 attn(norm(x / 2)), then x + 2 s mlp(norm(x / 2)) with
    a factor s for each channel, 1e-5 at first.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.ls2 = LayerScale(dim, init_values=1e-5)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x / 2), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(2 * attended)
        return cast(Tensor, x + self.drop_path2(2 * self.ls2(self.mlp(self.norm2(x / 2)))))


class RefinerVisionTransformer(AttentionVisionTransformer):
    """Blocks whose maps are refined by every second one."""

    def __init__(self, **kwargs: Any) -> None:
        attention = {"blocks": "all", "share": True}
        super().__init__(kind="refiner", attention=attention, block_fn=DoubledBlock, embed_layer=Stem, **kwargs)
        nn.init.trunc_normal_(self.cls_token, std=0.02)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> RefinerVisionTransformer:
    return cast(
        RefinerVisionTransformer,
        build_model_with_cfg(
            RefinerVisionTransformer,
            variant,
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},  # of features_only, as timm's vision transformers
            **{"mlp_ratio": 3.0, "num_heads": 12, **kwargs},
        ),
    )


default_cfgs = generate_default_cfgs({
    name: {"first_conv": "patch_embed.proj.0.0", "classifier": "head"}
    for name in ("refiner_vit_s", "refiner_vit_m", "refiner_vit_l")
})  # fmt: skip


@register_model
def refiner_vit_s(pretrained: bool = False, **kwargs: Any) -> RefinerVisionTransformer:
    """384 wide, 16 blocks of 12 heads."""
    return _build("refiner_vit_s", pretrained, **{"embed_dim": 384, "depth": 16, **kwargs})


@register_model
def refiner_vit_m(pretrained: bool = False, **kwargs: Any) -> RefinerVisionTransformer:
    """420 wide, 32 blocks of 12 heads."""
    return _build("refiner_vit_m", pretrained, **{"embed_dim": 420, "depth": 32, **kwargs})


@register_model
def refiner_vit_l(pretrained: bool = False, **kwargs: Any) -> RefinerVisionTransformer:
    """512 wide, 32 blocks of 16 heads."""
    return _build("refiner_vit_l", pretrained, **{"embed_dim": 512, "depth": 32, "num_heads": 16, **kwargs})
