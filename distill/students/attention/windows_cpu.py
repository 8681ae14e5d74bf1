"""Focal attention on a CPU: window by window, with exactly the keys that a window has, or for few tokens with all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.students.attention.layout import Layout, Window, mean_keys

LOGITS_PER_THREAD = 2**18
"""Of a chunk of images."""
LEAST_IMAGES = 16
"""From which on the dense form may be taken. What FLOPs are counted with, one image, has exactly the keys there are."""
LOGITS_PER_COPY = 75
"""How many logits take the time of one more copy of a token, for another window that it is a key of."""


def is_faster_dense(layout: Layout, images: int) -> bool:
    """Whether one product of all queries and keys of an image takes less time than its windows one by one."""
    windows = layout.rows * layout.columns
    costs = [
        layout.tokens * keys + LOGITS_PER_COPY * copies
        for keys, copies in (
            (layout.tokens + windows, layout.tokens + windows),
            (mean_keys(layout), windows * mean_keys(layout)),
        )
    ]
    return images >= LEAST_IMAGES and costs[0] <= costs[1]


def attend_in_windows(layout: Layout, qkv: Tensor, pooled: Tensor, near: Tensor, coarse: Tensor) -> Tensor:
    """Focal attention of the grid's queries, [B, h * w, heads, d].

    Args:
        qkv: queries, keys and values of all tokens, [B, N, 3, heads, d].
        pooled: keys and values of the pooled windows, [B, rows, columns, 2, heads, d].
        near: bias of the keys in and around a window, [heads, window^2, E, E].
        coarse: bias of the pooled windows around it, [heads, window^2, f, f].
    """
    tensors = _as_autocast(qkv, pooled, near, coarse)
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _InWindows.apply(layout, *tensors)
        return output


def attend_densely(qkv: Tensor, pooled: Tensor, bias: Tensor) -> Tensor:
    """Attention of all queries, [B, N, heads, d].

    Args:
        qkv: queries, keys and values of all tokens, [B, N, 3, heads, d].
        pooled: further keys and values, [B, M, 2, heads, d].
        bias: [heads, N, N + M]; -inf where a query has not this key.
    """
    tensors = _as_autocast(qkv, pooled, bias)
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _Dense.apply(*tensors)
        return output


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


class _Dense(torch.autograd.Function):
    """Saves its inputs for the backward pass, and the weights if they need little more memory than these; else it
    computes them again.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, qkv: Tensor, pooled: Tensor, bias: Tensor) -> Tensor:
        heads, queries, keys = bias.shape
        output, kept = qkv.new_empty(qkv[:, :, 0].shape), []
        for images in _images(len(qkv), heads * queries * keys):
            query, key, value = _all_of(qkv[images], pooled[images])
            weights = _weights(query, key, bias)
            target = output[images]
            target.copy_(_scattered(torch.bmm(weights, value), target))
            if any(ctx.needs_input_grad) and keys <= 3 * qkv.shape[-1]:
                kept.append(weights)
        ctx.save_for_backward(qkv, pooled, bias, *kept)
        return output

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        qkv, pooled, bias, *kept = ctx.saved_tensors
        heads, queries, keys = bias.shape
        by_qkv, by_pooled = torch.empty_like(qkv), torch.empty_like(pooled)
        by_bias = qkv.new_zeros(heads, queries, keys, dtype=torch.promote_types(qkv.dtype, torch.float32))
        for images, weights in zip_longest(_images(len(qkv), heads * queries * keys), kept):
            query, key, value = _all_of(qkv[images], pooled[images])
            if weights is None:
                weights = _weights(query, key, bias)
            by_output = _heads_first(grad[images]).flatten(0, 1)
            by_weights = torch.bmm(by_output, value.transpose(1, 2))
            by_logits = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_bias += by_logits.unflatten(0, (-1, heads)).sum(0)
            target = by_qkv[images, :, 0]
            target.copy_(_scattered(torch.bmm(by_logits, key), target).mul_(query.shape[-1] ** -0.5))
            by_key, by_value = (
                torch.bmm(by_logits.transpose(1, 2), query),
                torch.bmm(weights.transpose(1, 2), by_output),
            )
            for part, gradient in enumerate((by_key, by_value)):
                tokens, windows = by_qkv[images, :, 1 + part], by_pooled[images, :, part]
                tokens.copy_(_scattered(gradient[:, :queries], tokens))
                windows.copy_(_scattered(gradient[:, queries:], windows))
        return by_qkv, by_pooled, by_bias


def _weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Scaled queries [B * heads, Q, d], keys [B * heads, K, d], bias [heads, Q, K] -> [B * heads, Q, K]."""
    logits = torch.bmm(query, key.transpose(1, 2)).unflatten(0, (-1, len(bias)))
    logits += bias
    return logits.softmax(-1).flatten(0, 1)


def _all_of(qkv: Tensor, pooled: Tensor) -> list[Tensor]:
    """Scaled queries, keys and values, [B * heads, tokens, d] each."""
    query = _heads_first(qkv[:, :, 0]).mul_(qkv.shape[-1] ** -0.5)
    others = [_heads_first(torch.cat([qkv[:, :, 1 + part], pooled[:, :, part]], 1)) for part in range(2)]
    return [tensor.flatten(0, 1) for tensor in (query, *others)]


def _images(number: int, logits: int) -> Iterator[slice]:
    """Chunks of images that have so many logits each."""
    images = max(1, LOGITS_PER_THREAD * torch.get_num_threads() // logits)
    return (slice(start, start + images) for start in range(0, number, images))


class _InWindows(torch.autograd.Function):
    """Saves its inputs, heads first, and the weights for the backward pass.

    Heads come first in all of the map before windows are copied out of it, so that rows of tokens are copied whole.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, layout: Layout, qkv: Tensor, pooled: Tensor, near: Tensor, coarse: Tensor) -> Tensor:
        sources = [part.clone(memory_format=torch.contiguous_format) for part in _parts(layout, qkv, pooled)]
        sources[0][0] *= qkv.shape[-1] ** -0.5
        output, kept = torch.empty_like(sources[0][0]), []
        for window, images in _chunks(layout, qkv):
            query, key, value = _gathered(window, [part[:, images] for part in sources])
            logits = torch.bmm(query, key.transpose(1, 2)).unflatten(0, (-1, qkv.shape[3]))
            logits += _bias(layout, window, near, coarse)
            weights = logits.softmax(-1).flatten(0, 1)
            target = output[images][:, :, *window.queries]
            target.copy_(torch.bmm(weights, value).view(target.shape))
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(*sources, *kept)
        ctx.layout, ctx.shapes = layout, (qkv.shape, pooled.shape, near.shape, coarse.shape)
        return output.flatten(2, 3).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layout, (qkv_shape, pooled_shape, *bias_shapes) = ctx.layout, ctx.shapes
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        sources, kept = saved[:3], saved[3:]
        by_sources = [torch.zeros_like(part) for part in sources]
        heads = qkv_shape[3]
        at_least_single = torch.promote_types(grad.dtype, torch.float32)
        by_near, by_coarse = (grad.new_zeros(shape, dtype=at_least_single) for shape in bias_shapes)
        grad = _heads_first(grad).unflatten(2, (layout.height, layout.width))
        by_qkv, by_pooled = grad.new_empty(qkv_shape), grad.new_empty(pooled_shape)
        for (window, images), weights in zip(_chunks(layout, by_qkv), kept, strict=True):
            query, key, value = _gathered(window, [part[:, images] for part in sources])
            by_output = grad[images][:, :, *window.queries].reshape(query.shape)
            by_weights = torch.bmm(by_output, value.transpose(1, 2))
            by_logits = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_bias = by_logits.unflatten(0, (-1, heads)).sum(0, dtype=at_least_single)
            count = by_bias.shape[-1] - layout.prefix
            coarse_count = math.prod(span.stop - span.start for span in window.pooled)
            for total, rectangle, part in (
                (by_near, window.near, by_bias[..., : count - coarse_count]),
                (by_coarse, window.coarse, by_bias[..., count - coarse_count : count]),
            ):
                target = window.of_queries(total, layout.window)[..., *rectangle]
                target += part.reshape(target.shape)
            patches, windows, prefix = (part[:, images] for part in by_sources)
            target = patches[0][:, :, *window.queries]
            target.copy_(torch.bmm(by_logits, key).view(target.shape))
            for part, gradient in (
                (0, torch.bmm(by_logits.transpose(1, 2), query)),
                (1, torch.bmm(weights.transpose(1, 2), by_output)),
            ):
                targets = (patches[1 + part][:, :, *window.keys], windows[part][:, :, *window.pooled], prefix[part])
                sizes = [target.shape[2:-1].numel() for target in targets]
                for target, rows in zip(targets, gradient.unflatten(0, (-1, heads)).split(sizes, 2), strict=True):
                    target += rows.unflatten(2, target.shape[2:-1])
        by_sources[0][0] *= qkv_shape[-1] ** -0.5
        by_qkv[:, : layout.prefix, 0] = 0
        for target, part in zip(_parts(layout, by_qkv, by_pooled), by_sources, strict=True):
            target.copy_(part)
        return None, by_qkv, by_pooled, by_near, by_coarse


def _parts(layout: Layout, qkv: Tensor, pooled: Tensor) -> list[Tensor]:
    """Views, heads first: the grid's queries, keys and values [3, B, heads, h, w, d], keys and values of the pooled
    windows [2, B, heads, rows, columns, d], and those of the prefix tokens [2, B, heads, P, d].
    """
    patches = qkv[:, layout.prefix :].unflatten(1, (layout.height, layout.width))
    return [
        patches.permute(3, 0, 4, 1, 2, 5),
        pooled.permute(3, 0, 4, 1, 2, 5),
        qkv[:, : layout.prefix, 1:].permute(2, 0, 3, 1, 4),
    ]


def _chunks(layout: Layout, qkv: Tensor) -> Iterator[tuple[Window, slice]]:
    """Each window with some of the images at a time."""
    reach = layout.window + 2 * layout.expand
    logits = layout.window**2 * (reach**2 + layout.focal_window**2 + layout.prefix) * qkv.shape[3]
    for images in _images(len(qkv), logits):
        for window in layout.windows():
            yield window, images


def _gathered(window: Window, parts: Sequence[Tensor]) -> list[Tensor]:
    """Queries of a window, its keys and values, out of `_parts`: [B * heads, tokens, d] each."""
    patches, pooled, prefix = parts
    gathered = [patches[0][:, :, *window.queries].flatten(2, 3)]
    for part in range(2):
        sources = (patches[1 + part][:, :, *window.keys], pooled[part][:, :, *window.pooled], prefix[part])
        sizes = [source.shape[2:-1].numel() for source in sources]
        whole = prefix.new_empty(*prefix.shape[1:3], sum(sizes), prefix.shape[-1])
        for target, source in zip(whole.split(sizes, 2), sources, strict=True):
            target.unflatten(2, source.shape[2:-1]).copy_(source)
        gathered.append(whole)
    return [tensor.flatten(0, 1) for tensor in gathered]


def _heads_first(x: Tensor) -> Tensor:
    """A copy: [B, tokens, heads, d] -> [B, heads, tokens, d]."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _scattered(x: Tensor, target: Tensor) -> Tensor:
    """[B * heads, tokens, d] -> a view like `target` [B, ..., heads, d]."""
    return x.unflatten(0, (-1, target.shape[-2])).transpose(1, 2).unflatten(1, target.shape[1:-2])


def _bias(layout: Layout, window: Window, near: Tensor, coarse: Tensor) -> Tensor:
    """[heads, queries, keys] of a window."""
    biases = [window.near_bias(near, layout.window), window.coarse_bias(coarse, layout.window)]
    return torch.nn.functional.pad(torch.cat(biases, -1), (0, layout.prefix))
