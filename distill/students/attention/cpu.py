"""Exact attention on a CPU, plain or over areas, in chunks of images whose logits fit the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.students.attention.area_pooling import Areas, pool_rows, unpool_rows_

LOGITS_PER_THREAD = 3 * 2**17
"""Of a chunk, about the size of a core's L2 cache. Compared with 2**18, on an EPYC with 1 MiB: 0.96 to 0.99 of a step's
time in bf16, 1.00 to 1.01 in float32 (ViT-Nano and Tiny, 66 tokens)."""
LOG2_E = math.log2(math.e)


def eager_on_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def attend(*sources: Tensor, areas: Areas, mean_values: bool = False) -> Tensor:
    """softmax(q . mean key / sqrt(d)) @ (sum or mean of values) over all areas, [B, Q, heads, d].

    Args:
        sources: one packed tensor [B, tokens, 3, heads, d] of queries, keys and values (its gradient is packed too), or
            query [B, heads, Q, d], key and value [B, heads, tokens, d].
        areas: of the tokens; areas of one token each are plain attention.
    """
    if torch.is_autocast_enabled("cpu"):
        sources = tuple(source.to(torch.get_autocast_dtype("cpu")) for source in sources)
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(areas, mean_values, *sources)


class _Attention(torch.autograd.Function):
    """Saves its inputs for the backward pass, and the weights if they need no more memory than these; else it
    recomputes them, chunk by chunk.

    Logits are [keys, queries], so that pooling adds whole rows.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, areas: Areas, mean_values: bool, *sources: Tensor) -> Tensor:
        query, key, value = _unpacked(sources)
        images = _images_per_piece(query, areas)
        output = query.new_empty(query.transpose(1, 2).shape)
        tensors = (query, key, value, output.transpose(1, 2))
        kept = []
        # Plain attention over few tokens; 0.96 to 0.98 of a step's time.
        keeps = any(ctx.needs_input_grad) and areas.number == key.shape[2] <= 3 * key.shape[3]
        for q, k, v, o in zip(*(_pieces(tensor, images) for tensor in tensors), strict=True):
            weights = _area_weights(q * q.shape[-1] ** -0.5, k.contiguous(), areas)
            if keeps:
                kept.append(weights)
            o.copy_(torch.bmm(unpool_rows_(weights, areas, mean_values).transpose(1, 2), v.contiguous()))
        ctx.save_for_backward(*sources, *kept)
        ctx.areas, ctx.mean_values, ctx.sources, ctx.images = areas, mean_values, len(sources), images
        return output

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, areas = ctx.saved_tensors, ctx.areas
        sources, kept = saved[: ctx.sources], saved[ctx.sources :]
        gradients = [torch.empty_like(source) for source in sources]
        query, key, value = _unpacked(sources)
        scale = query.shape[-1] ** -0.5
        tensors = (query, key, value, grad.transpose(1, 2), *_unpacked(gradients))
        pieces = zip(*(_pieces(tensor, ctx.images) for tensor in tensors), strict=True)
        for (q, k, v, g, dq, dk, dv), weights in zip_longest(pieces, kept):
            q, k, g = q * scale, k.contiguous(), g.contiguous()
            if weights is None:
                weights = _area_weights(q, k, areas)
            by_weight = pool_rows(torch.bmm(v.contiguous(), g.transpose(1, 2)), areas, ctx.mean_values)
            by_logit = torch._softmax_backward_data(by_weight, weights, 1, weights.dtype)
            dv.copy_(torch.bmm(unpool_rows_(weights, areas, ctx.mean_values), g))
            by_logit = unpool_rows_(by_logit, areas, mean=True)
            torch.mul(torch.bmm(by_logit.transpose(1, 2), k), scale, out=dq)
            dk.copy_(torch.bmm(by_logit, q))
        return None, None, *gradients


def _unpacked(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """Views: query, key and value, [B, heads, tokens, d] each."""
    return sources if len(sources) == 3 else sources[0].permute(2, 0, 3, 1, 4).unbind(0)


def _images_per_piece(query: Tensor, areas: Areas) -> int:
    """At least one for each thread; the pieces of a head are about equal."""
    batch, logits_per_image = query.shape[0], query.shape[2] * areas.number
    at_most = max(1, LOGITS_PER_THREAD // logits_per_image) * torch.get_num_threads()
    return math.ceil(batch / math.ceil(batch / at_most)) if batch else 1


def _pieces(x: Tensor, images: int) -> list[Tensor]:
    """[B, heads, tokens, d] -> views [images, tokens, d], the last ones of a head maybe smaller."""
    return [piece for head in x.unbind(1) for piece in head.split(images)]


def _area_weights(query: Tensor, key: Tensor, areas: Areas) -> Tensor:
    """softmax over the areas of scaled queries [n, Q, d] and of keys [n, tokens, d]: [n, areas, Q]."""
    logits = pool_rows(torch.bmm(key, query.transpose(1, 2)), areas, mean=True)
    if logits.element_size() == 2:
        return logits.softmax(1)
    # As torch's softmax, with a faster exponential. No area's mean exceeds the largest token logit.
    largest = logits.narrow(1, 0, key.shape[1]).amax(1, keepdim=True)
    torch.add(largest.mul_(-LOG2_E), logits, alpha=LOG2_E, out=logits).exp2_()
    return logits.div_(logits.sum(1, keepdim=True))
