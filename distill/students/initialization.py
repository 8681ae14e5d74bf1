"""Structured initial weights of vision transformers (`student.init`), in place of timm's random ones.

Both kinds start from sinusoidal positions of the patches, and change nothing else but weights of the attention.
timm's layout: `qkv` is one linear layer [3 D, D] with x W^T + b; its rows are queries, keys and values, each of them by
heads. So a head's W_Q of the papers, [D, d], is a transposed block of d rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from distill.recipe.initialization import Impulse, Mimetic

BASE = 10_000.0
"""Base of the frequencies of a position embedding (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
RIDGE = 0.05
"""Of the least squares, over the largest singular value of the positions: without it the weights would grow by orders
of magnitude, and small differences between tokens with them.
"""
LARGEST_LOGIT = 200.0
"""Bounds the weights where no scale reaches the mean attention."""
MOST_QUERIES = 256
"""That the mean attention is measured on."""


def sinusoidal_positions(height: int, width: int, dim: int) -> Tensor:
    """float64 [height * width, dim], row by row: dim / 4 sines and cosines of x, then of y; dim divides by 4."""
    frequencies = BASE ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


@torch.no_grad()
def initialize_mimetic(model: VisionTransformer, options: Mimetic) -> None:
    """Mimetic initialisation: Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers" (arXiv
    2305.09828), with torch's generator.

    W_Q W_K^T of each head is the best approximation of rank d of alpha1 Z + beta1 I; W_V W_proj of all heads together
    is alpha2 Z - beta2 I. Z, [D, D], has independent elements of variance 1 / D.
    """
    _set_positions(model)
    for block in model.blocks:
        attention: Any = block.attn
        dim, heads = attention.proj.in_features, attention.num_heads
        if _has_maps(attention):
            products = [_near_identity(dim, options.alpha1, options.beta1) for _ in range(heads)]
            _set_queries_and_keys(attention, [_factors(product, dim // heads) for product in products])
        value, projection = _factors(_near_identity(dim, options.alpha2, -options.beta2), dim)
        attention.qkv.weight[-dim:] = value.T
        attention.proj.weight.copy_(projection)


@torch.no_grad()
def initialize_impulse(model: VisionTransformer, options: Impulse) -> None:
    """Impulse initialisation: Zheng et al. 2024, "Structured Initialization for Attention in Vision Transformers"
    (arXiv 2404.01139); Zheng et al. 2025, "Structured Initialization for Vision Transformers" (arXiv 2505.19985).

    Each head draws an offset of the window, with torch's generator. Its W_Q and W_K are such that softmax attention
    over the normalised positions is a filter with one element, at that offset. Differences from the papers: the
    logits are fitted by ridge regression and scaled until the mean attention of patches on their neighbours is
    `focus`; class and distillation token (the paper of 2024 pools the patches instead) keep their random embeddings,
    and attend and are attended to as it happens. The fit is to positions alone: patches' contents, and what earlier
    blocks add, blur it.
    """
    height, width = model.patch_embed.grid_size
    _set_positions(model)
    positions = nn.functional.layer_norm(sinusoidal_positions(height, width, model.embed_dim), (model.embed_dim,))
    solved: dict[int, tuple[Tensor, Tensor]] = {}
    for block in model.blocks:
        attention: Any = block.attn
        if not _has_maps(attention):
            continue
        dim, heads = attention.proj.in_features, attention.num_heads
        offsets = torch.randint(options.window**2, (heads,)).tolist()
        for offset in offsets:
            if offset not in solved:
                down, right = (part - options.window // 2 for part in divmod(offset, options.window))
                pairs = _neighbours(height, width, down, right)
                solved[offset] = _impulse(positions, pairs, dim // heads, options.focus)
        _set_queries_and_keys(attention, [solved[offset] for offset in offsets])


def _near_identity(dim: int, noise: float, weight: float) -> Tensor:
    drawn = torch.randn(dim, dim, dtype=torch.float64) / math.sqrt(dim)
    return noise * drawn + weight * torch.eye(dim, dtype=torch.float64)


def _impulse(positions: Tensor, pairs: Tensor, head_dim: int, focus: float) -> tuple[Tensor, Tensor]:
    """W_Q and W_K, [D, head_dim], of attention from `pairs[0]` to `pairs[1]` among the positions [N, D].

    The bilinear form M of the logits P M P^T that are closest to H, which is 1 for these pairs and 0 elsewhere, is
    P^+ H P^+^T; here P^+ = (P^T P + r^2 I)^-1 P^T.
    """
    gram = positions.T @ positions
    largest = torch.linalg.eigvalsh(gram)[-1]
    regularised = gram + RIDGE**2 * largest * torch.eye(len(gram), dtype=gram.dtype)
    moments = positions[pairs[0]].T @ positions[pairs[1]]  # P^T H P
    form = torch.linalg.solve(regularised, torch.linalg.solve(regularised, moments).T).T
    query, key = _factors(form, head_dim)
    chosen = torch.linspace(0, pairs.shape[1] - 1, min(pairs.shape[1], MOST_QUERIES)).long()
    logits = (positions[pairs[0, chosen]] @ query) @ (positions @ key).T
    targets = pairs[1, chosen, None]
    low, high = 0.0, float(LARGEST_LOGIT / logits.abs().max())
    for _ in range(30):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _mean_attention(middle * logits, targets) < focus else (low, middle)
    scale = math.sqrt(high * math.sqrt(head_dim))  # attention divides the logits by sqrt(head_dim)
    return scale * query, scale * key


def _mean_attention(logits: Tensor, targets: Tensor) -> float:
    return float(logits.softmax(-1).gather(-1, targets).mean())


def _neighbours(height: int, width: int, down: int, right: int) -> Tensor:
    """[2, pairs]: patches, and their neighbours at this offset, where the grid has both."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
    patches = (y * width + x)[inside]
    return torch.stack([patches, patches + down * width + right])


def _set_positions(model: VisionTransformer) -> None:
    """Sinusoidal positions for the patches; those of the prefix tokens stay."""
    assert model.pos_embed is not None
    height, width = model.patch_embed.grid_size
    positions = sinusoidal_positions(height, width, model.embed_dim)
    model.pos_embed[:, model.num_prefix_tokens :] = positions


def _has_maps(attention: Any) -> bool:
    """Whether it has queries and keys: not where a block uses another one's maps."""
    return bool(attention.qkv.out_features == 3 * attention.proj.in_features)


def _factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, [D, rank], whose A B^T is the best approximation of `product` [D, D] of that rank; equally large."""
    left, values, right = torch.linalg.svd(product)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].T * root


def _set_queries_and_keys(attention: Any, by_head: list[tuple[Tensor, Tensor]]) -> None:
    dim = attention.proj.in_features
    for start, part in ((0, 0), (dim, 1)):
        attention.qkv.weight[start : start + dim] = torch.cat([factors[part].T for factors in by_head])
