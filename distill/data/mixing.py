"""Mixup and CutMix of sample pairs (2k, 2k + 1) of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.geometry import Boxes, inside
from distill.data.randomness import integers, look_up, uniform

SAMPLE_DRAWS = ("mixup/lambda",)
PAIR_DRAWS = ("mix/whether", "mix/switch", "cutmix/lambda", "cutmix/y", "cutmix/x")


def cutmix_boxes(share: Tensor, centre_y: Tensor, centre_x: Tensor, height: int, width: int) -> Boxes:
    """Boxes of CutMix, [P] each: of area `share` (float in [0, 1]) and the image's shape, about the centre, clipped
    to the image.
    """
    side = share.sqrt()
    half_height, half_width = (side * height).long() // 2, (side * width).long() // 2
    top, bottom = (centre_y - half_height).clamp_min(0), (centre_y + half_height).clamp_max(height)
    left, right = (centre_x - half_width).clamp_min(0), (centre_x + half_width).clamp_max(width)
    return Boxes(top, left, bottom - top, right - left)


def mix_pairs(
    images: Tensor,
    targets: Tensor,
    sample_hashes: Tensor,
    pair_hashes: Tensor,
    *,
    mixup: Tensor | None,
    cutmix: Tensor | None,
    probability: Tensor | float,
    switch: float,
) -> tuple[Tensor, Tensor]:
    """Mix every sample with its neighbour; images float32 [B, C, H, W] and targets float32 [B, K] -> the same.

    Mixup (Zhang et al. 2018): own * lambda + partner * (1 - lambda), lambda drawn per sample. CutMix (Yun et al.
    2019): the two swap one box; lambda is the exact fraction of remaining pixels. A pair is mixed with `probability`;
    if both are on, by CutMix with probability `switch`. `mixup`, `cutmix`: tables of Beta quantiles (`beta_table`);
    None: off. `sample_hashes` [1, B], `pair_hashes` [5, B/2] in the order of SAMPLE_DRAWS and PAIR_DRAWS.
    """
    height, width = images.shape[-2:]
    pairs = pair_hashes.shape[1]
    mix, choose, *_ = uniform(pair_hashes)
    mixed = (mix < probability)[:, None].expand(-1, 2).reshape(-1)
    own_share = images.new_ones(2 * pairs)
    weight = own_share.view(-1, 1, 1, 1)  # of a sample's own pixels
    if mixup is not None:
        own_share = look_up(mixup, sample_hashes[0])
        weight = own_share.view(-1, 1, 1, 1)
    if cutmix is not None:
        lam = look_up(cutmix, pair_hashes[2])
        centre_y, centre_x = integers(pair_hashes[3], height), integers(pair_hashes[4], width)
        boxes = cutmix_boxes(1.0 - lam, centre_y, centre_x, height, width)
        kept = (~inside(boxes, height, width)).to(images.dtype).repeat_interleave(2, 0, output_size=2 * pairs)
        kept_share = 1.0 - (boxes.height * boxes.width).to(images.dtype) / (height * width)
        kept_share = kept_share[:, None].expand(-1, 2).reshape(-1)
        if mixup is None:
            own_share, weight = kept_share, kept
        else:
            cut = (choose < switch)[:, None].expand(-1, 2).reshape(-1)
            own_share = torch.where(cut, kept_share, own_share)
            weight = torch.where(cut.view(-1, 1, 1, 1), kept, weight)
    own_share = torch.where(mixed, own_share, 1.0)
    weight = torch.where(mixed.view(-1, 1, 1, 1), weight, 1.0)
    return _blend(images, weight), _blend(targets, own_share[:, None])


def _blend(values: Tensor, weight: Tensor) -> Tensor:
    """weight * own + (1 - weight) * partner's; exact where the weight is 0 or 1."""
    partners = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return partners.lerp_(values, weight)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """int64 [B] -> float32 [B, num_classes]."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(torch.float32)
