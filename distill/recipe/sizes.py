"""Named sizes of vision transformers, without torch, for the validation of recipes."""

from typing import NamedTuple


class VitSize(NamedTuple):
    width: int
    depth: int
    heads: int


# nano and micro are this project's; tiny, small and base are DeiT's (arXiv 2012.12877, table 1), large and huge ViT's
# (arXiv 2010.11929, table 1).
VIT_SIZES = {
    "vit_nano": VitSize(96, 6, 3),
    "vit_micro": VitSize(128, 8, 4),
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "vit_base": VitSize(768, 12, 12),
    "vit_large": VitSize(1024, 24, 16),
    "vit_huge": VitSize(1280, 32, 16),
}
DEFAULT_PATCH_SIZE = 16
MOST_PATCHES_A_SIDE = 256
