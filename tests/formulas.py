"""Oracles: floating-point operations by closed formulas, two for every multiply-add of a matrix product, and a test in
exact arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from distill.options import StudentOptions
from distill.recipe import VIT_SIZES
from distill.recipe.pyramids import PyramidOptions, PyramidSize


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


def pyramid_forward(student: PyramidOptions, *, resolution: int, num_classes: int) -> int:
    """One image of a side that all windows divide through a pyramid for 32 px, with a stem of one convolution."""
    size = student.size
    heads = 1 if student.distillation_token is False else 2
    sides = [resolution // (size.patch * 2**stage) for stage in range(len(size.depths))]
    widths = [size.width * 2**stage for stage in range(len(size.depths))]
    total = heads * 2 * widths[-1] * num_classes
    for stage, (side, width, depth) in enumerate(zip(sides, widths, size.depths, strict=True)):
        block, before = {
            "regional": _regional,
            "focal": _focal,
            "local_global": _local_global,
        }[student.family](size, stage, side, width)
        total += depth * block + before
    return total


def _stem_or_between(size: PyramidSize, stage: int, side: int, width: int, by_stage: int) -> int:
    """The stem's convolution of patches, or `by_stage` multiply-adds for each place and channel between stages."""
    return 2 * side**2 * width * (3 * size.patch**2 if stage == 0 else by_stage)


def _regional(size: PyramidSize, stage: int, side: int, width: int) -> tuple[int, int]:
    regions, window = (side // size.window) ** 2, size.window**2 + 1
    among = 2 * regions * 4 * width**2 + 2 * 2 * regions**2 * width
    within = 2 * regions * window * 12 * width**2 + 2 * 2 * regions * window**2 * width
    if stage:
        return among + within, 2 * (side**2 + regions) * 9 * width  # a 3x3 kernel for each channel
    stems = 3 * (2 * size.patch) ** 2 * side**2 + 3 * (size.patch * size.window) ** 2 * regions
    return among + within, 2 * stems * width


def _focal(size: PyramidSize, stage: int, side: int, width: int) -> tuple[int, int]:
    last = stage == len(size.depths) - 1
    ring, focal, windows = (0, 0, side // size.window) if last else (size.window // 2, 1, side // size.window)
    near = [min(side, (i + 1) * size.window + ring) - max(0, i * size.window - ring) for i in range(windows)]
    pooled = [min(windows, i + 1 + focal) - max(0, i - focal) for i in range(windows)]
    keys = sum(near[i] * near[j] + pooled[i] * pooled[j] for i, j in itertools.product(range(windows), repeat=2))
    attention = 2 * 2 * size.window**2 * keys * width
    pools = 2 * side**2 * width + 2 * windows**2 * 2 * width**2
    block = 2 * side**2 * 12 * width**2 + attention + pools
    return block, _stem_or_between(size, stage, side, width, 4 * width // 2)


def _local_global(size: PyramidSize, stage: int, side: int, width: int) -> tuple[int, int]:
    block = 2 * side**2 * 8 * width**2
    for scale in range(len(size.depths) - stage):
        places = (side // 2**scale) ** 2
        block += 2 * places * 4 * width**2 + 2 * 2 * places * size.window**2 * width
    return block, _stem_or_between(size, stage, side, width, 4 * width // 2)


def p_of_flipped_signs(differences: Sequence[int]) -> float:
    """Two-sided p of the sum of whole numbers under random signs, in exact arithmetic."""
    numbers = [abs(one) for one in differences]
    ways = {0: 1}
    for number in filter(None, numbers):
        grown: dict[int, int] = {}
        for total, count in ways.items():
            for new in (total - number, total + number):
                grown[new] = grown.get(new, 0) + count
        ways = grown
    seen = abs(sum(differences))
    return float(Fraction(sum(count for total, count in ways.items() if abs(total) >= seen), sum(ways.values())))
