"""Where the tokens that a transformer answers with look, block by block, and how alike two of them are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from distill.students import Student
from distill.students.attention import AttentionKind, AttentionMaps
from distill.students.pyramid import GridAttention

TOKENS = ("class token", "distillation token")
STRONGEST = 4
"""Areas that are drawn for each token and block."""


@dataclass(frozen=True)
class Seen:
    """What B images show of a student's attention in its depth blocks. `side` is that of the grid of patches, of a
    pyramid that of its finest one, to which the places of the others are enlarged; all weights are means over heads.
    """

    tokens: tuple[str, ...]
    """Names of the T tokens that look: that of each head or, where there are none, the mean of all that look."""
    side: int
    patches: Tensor
    """float32 [depth, B, T, side, side]: the weight that each patch has in a token's answer."""
    areas: dict[int, Tensor]
    """By block with areas: which patches the strongest ones cover, bool [B, T, strongest, side, side], the strongest
    first; of areas that cover more than one token only."""
    cosines: tuple[float, ...]
    """Between class and distillation token, mean over all images: before the first block, then after each. Empty where
    there are no such tokens."""


@torch.inference_mode()
def look(student: Student, images: Tensor, drawn: int) -> Seen | None:
    """Run images [N, C, H, W] in [0, 1], on the student's device, and write down what its attention did with the first
    `drawn` of them.

    It goes by the attention modules that the student has, of timm's plain kind or of one with `maps`. None for a
    student without them, or whose tokens are anything but one square grid of patches behind a token for each head, or
    square maps.
    """
    if any(isinstance(module, GridAttention) for module in student.modules()):
        return _look_at_maps(student, images[:drawn])
    attention = {
        name: module for name, module in student.model.named_modules() if isinstance(module, Attention | AttentionKind)
    }
    blocks = [student.model.get_submodule(name.rpartition(".")[0]) for name in attention]
    expected = (0, max(1, len(student.heads)))  # the class token of a student without heads
    with _recording(attention.values()) as calls, _recording(blocks) as block_calls:
        _answer(student, images)
    if not calls:
        return None
    count = calls[0][1][0].shape[1]
    side = math.isqrt(count)
    prefix = count - side**2
    if prefix not in expected or any(tokens.shape[:-1] != (len(images), count) for _, (tokens, *_), _ in calls):
        return None
    patches, areas = [], {}
    for index, (module, (tokens, *_), _) in enumerate(calls):
        maps = attention_maps(module, tokens[:drawn], queries=prefix or count)
        if maps is None:
            return None
        weights, covered = maps.weights.mean(1), maps.covered
        if not prefix:
            weights = weights.mean(1, keepdim=True)
        patches.append((weights @ maps.shares)[..., prefix:].float().cpu())
        if len(covered) > covered.shape[1]:
            areas[index] = _strongest(weights, covered)[..., prefix:].unflatten(-1, (side, side))
    return Seen(
        tokens=TOKENS[:prefix] or ("mean of all patches",),
        side=side,
        patches=torch.stack(patches).unflatten(-1, (side, side)),
        areas=areas,
        cosines=_cosines([block_calls[0][1][0], *(output for *_, output in block_calls)]) if prefix == 2 else (),
    )


def _answer(student: Student, images: Tensor) -> None:
    """A forward pass as in evaluation."""
    student.logits(images) if student.heads else student.embedding(images)


def _look_at_maps(student: Student, images: Tensor) -> Seen | None:
    """As `look`, for a pyramid: what its stages' maps look at in the mean."""
    modules = [module for module in student.model.modules() if isinstance(module, GridAttention)]
    with _recording(modules) as calls:
        _answer(student, images)
    seen = []
    for module, inputs, _ in calls:
        maps = module.maps(*inputs)
        weights, covered = maps.weights.mean((1, 2))[:, None], maps.covered
        areas = _strongest(weights, covered) if (covered.count_nonzero(1) > 1).any() else None
        seen.append(((weights @ maps.shares.to(weights)).float().cpu(), areas))
    sides = [math.isqrt(weights.shape[-1]) for weights, _ in seen]
    finest = max(sides)
    if any(side**2 != weights.shape[-1] or finest % side for side, (weights, _) in zip(sides, seen, strict=True)):
        return None

    def enlarged(places: Tensor, side: int) -> Tensor:
        """[..., side^2] -> [..., finest, finest]"""
        times = finest // side
        return places.unflatten(-1, (side, side)).repeat_interleave(times, -2).repeat_interleave(times, -1)

    return Seen(
        tokens=("mean of all places",),
        side=finest,
        patches=torch.stack([enlarged(weights, side) for side, (weights, _) in zip(sides, seen, strict=True)]),
        areas={
            index: enlarged(areas, side)
            for index, (side, (_, areas)) in enumerate(zip(sides, seen, strict=True))
            if areas is not None
        },
        cosines=(),
    )


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


def _strongest(weights: Tensor, covered: Tensor) -> Tensor:
    """Of weights [B, T, areas] and coverage [areas, tokens]: the tokens of the strongest areas, those of one token left
    out; bool [B, T, strongest, tokens].
    """
    wide = covered.count_nonzero(1) > 1
    several = covered[wide] != 0
    best = weights[..., wide].topk(min(STRONGEST, len(several)), dim=-1)
    return several[best.indices].cpu()


def _cosines(streams: list[Any]) -> tuple[float, ...]:
    """Between the first two tokens of each stream [B, N, dim]; empty where blocks take and give different shapes."""
    if not all(isinstance(stream, Tensor) and stream.shape == streams[0].shape for stream in streams):
        return ()
    return tuple(F.cosine_similarity(stream[:, 0], stream[:, 1]).mean().item() for stream in streams)


@contextmanager
def _recording(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Each call of these modules as (module, arguments, output), in their order."""
    calls: list[tuple[Any, Any, Any]] = []
    handles = [
        module.register_forward_hook(lambda called, inputs, output: calls.append((called, inputs, output)))
        for module in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
