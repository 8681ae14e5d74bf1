"""Floating-point operations of a model's forward pass, as torch counts them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs of `model(images)` in evaluation, images [B, C, H, W]: two for every multiply-add of matrix products and
    convolutions; elementwise work is not counted.

    Independent of device and torch release: kernels, and those that torch's counter knows, differ between them, so a
    copy of the model runs on the CPU without fused attention. There area attention with mean keys and summed or
    averaged values sums logits and weights of tokens, which count nothing; others pool keys and values, which count as
    further tokens. On a GPU all are pooled. Focal attention counts the keys that there are, with fewer than 16 images;
    with more it may compute others, and masks them.
    """
    model = copy.deepcopy(model).cpu().eval()
    fused = torch.backends.mha.get_fastpath_enabled()  # of nn.MultiheadAttention, as in torchvision's ViT
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images.cpu())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()
