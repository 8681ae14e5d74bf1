"""Where class and distillation token of a vision transformer look, and how alike the two are, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from distill.students import Student
from distill.students.attention import AttentionKind, AttentionMaps

STRONGEST = 4
"""Areas that are drawn for each token and block."""


@dataclass(frozen=True)
class Seen:
    """What B images, in the order they were given, show of a student's depth blocks and its T prefix tokens (the class
    token, then the distillation token). `grid` is the (height, width) of the patches, all weights are means over heads.
    """

    grid: tuple[int, int]
    patches: Tensor
    """float32 [depth, B, T, H * W]: the weight that each patch has in a token's answer."""
    areas: dict[int, tuple[Tensor, Tensor]]
    """By block with areas: which patches the strongest areas cover, bool [B, T, strongest, H * W], and their weights
    [B, T, strongest], in falling order; of areas that cover more than one token only."""
    token_cosines: tuple[float, ...]
    """Between class and distillation token, mean over the images: before the first block, then after each. Empty with
    one token."""
    head_cosines: tuple[float, ...]
    """The same between what the two heads say of these tokens, as if no block followed."""


def look(student: Student, images: Tensor) -> Seen | None:
    """Run images [B, C, H, W] in [0, 1], on the student's device, and write down what its attention did.

    None for a student without blocks behind prefix tokens whose attention has weights: a CNN, or a transformer of
    another kind.
    """
    model = student.model
    if not isinstance(model, VisionTransformer) or model.num_prefix_tokens < 1 or model.num_reg_tokens > 0:
        return None
    modules: list[Any] = [block.attn for block in model.blocks]
    if not all(isinstance(module, Attention | AttentionKind) for module in modules):
        return None
    with torch.inference_mode(), _recording(model) as recorded:
        student.logits(images)
        height, width = _grid(model, recorded[0].shape[1])
        prefix = model.num_prefix_tokens
        patches, areas = [], {}
        for index, (block, module) in enumerate(zip(model.blocks, modules, strict=True)):
            maps = attention_maps(module, block.norm1(recorded[index]), queries=prefix)
            if maps is None:
                return None
            weights, covered = maps.weights.mean(1), maps.covered
            shares = covered / covered.sum(1, keepdim=True) if maps.averages else covered
            patches.append((weights @ shares)[..., prefix:].float().cpu())
            if len(covered) > covered.shape[1]:
                areas[index] = _strongest(weights, covered, prefix)
        token_cosines, head_cosines = _cosines(model, recorded) if prefix == 2 else ((), ())
    return Seen((height, width), torch.stack(patches), areas, token_cosines, head_cosines)


def attention_maps(attention: Attention | AttentionKind, tokens: Tensor, *, queries: int) -> AttentionMaps | None:
    """Where the first `queries` of the tokens [B, N, dim] look; plain attention looks at single tokens."""
    if isinstance(attention, AttentionKind):
        return attention.maps(tokens, queries)
    batch, count, _ = tokens.shape
    qkv = attention.qkv(tokens).view(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, _ = qkv.unbind(0)
    query, key = attention.q_norm(query[:, :, :queries]), attention.k_norm(key)
    weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1)
    return AttentionMaps(weights, torch.eye(count, device=tokens.device))


def _strongest(weights: Tensor, covered: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Of weights [B, T, areas] and coverage [areas, tokens]: patches and weights of the strongest areas, those of one
    token left out."""
    several = covered.sum(1) > 1
    best = weights[..., several].topk(min(STRONGEST, int(several.sum())), dim=-1)
    return (covered[several][best.indices][..., prefix:] > 0).cpu(), best.values.float().cpu()


def _cosines(model: Any, recorded: list[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    tokens, heads = [], []
    for stream in recorded:
        tokens.append(F.cosine_similarity(stream[:, 0], stream[:, 1]).mean().item())
        normed = model.norm(stream)
        if hasattr(model, "head_dist"):
            heads.append(F.cosine_similarity(model.head(normed[:, 0]), model.head_dist(normed[:, 1])).mean().item())
    return tuple(tokens), tuple(heads)


def _grid(model: Any, tokens: int) -> tuple[int, int]:
    known = getattr(model, "patch_grid", None)
    height, width = (known.height, known.width) if known is not None else model.patch_embed.grid_size
    assert height * width + model.num_prefix_tokens == tokens
    return height, width


@contextmanager
def _recording(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """The tokens [B, N, dim] that enter the first block, and those that leave each."""
    streams: list[Tensor] = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))]
    handles += [block.register_forward_hook(lambda _, __, output: streams.append(output)) for block in model.blocks]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()
