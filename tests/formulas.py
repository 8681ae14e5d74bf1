"""Floating-point operations by closed formulas, two for every multiply-add of a matrix product: the oracle of
`distill.flops`.
"""

from __future__ import annotations

from distill.options import StudentOptions
from distill.recipe import VIT_SIZES


def vit_forward(student: StudentOptions, *, resolution: int, num_classes: int, channels: int = 3) -> int:
    """One image through a vit_* student with a patch stem.

    Area attention is counted as ordinary attention: its areas are made of sums.
    """
    assert student.stem == "patch"
    size, patch = VIT_SIZES[student.model], student.patch_size
    heads = 1 if student.distillation_token is False else 2
    patches = (resolution // patch) ** 2
    tokens = patches + heads
    projections = 12 * size.width**2  # 3 for q, k, v, 1 after the attention, 4 and 4 of the MLP
    block = 2 * tokens * projections + 2 * 2 * tokens**2 * size.width
    embedding = 2 * patches * channels * patch**2 * size.width
    return embedding + size.depth * block + heads * 2 * size.width * num_classes


def cifar_resnet_forward(depth: int, *, resolution: int = 32, num_classes: int = 10) -> int:
    """One image through a CIFAR ResNet (He et al. 2015, section 4.2) with parameter-free shortcuts."""
    blocks = (depth - 2) // 6
    total = 2 * resolution**2 * 9 * 3 * 16
    side, width = resolution, 16
    for stage in range(3):
        narrow = width
        if stage:
            side, width = -(-side // 2), width * 2
        first = 2 * side**2 * 9 * narrow * width
        rest = 2 * side**2 * 9 * width * width
        total += first + (2 * blocks - 1) * rest
    return total + 2 * width * num_classes
