"""Focal attention on a CPU, window by window, with exactly the keys that a window has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_THREAD = 2**17
"""Of a chunk of images, of one window."""


class Layout(NamedTuple):
    """A grid in windows, and the keys of their queries."""

    height: int
    width: int
    prefix: int
    """Tokens before the grid's."""
    window: int
    expand: int
    focal_window: int

    @property
    def rows(self) -> int:
        """Of windows."""
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        return -(-self.width // self.window)

    def windows(self) -> Iterator[Window]:
        """Row by row."""
        for row, column in product(range(self.rows), range(self.columns)):
            queries, keys, near, pooled, coarse = [], [], [], [], []
            for index, side, count in ((row, self.height, self.rows), (column, self.width, self.columns)):
                first, focal = index * self.window, self.focal_window // 2
                queries.append(slice(first, min(first + self.window, side)))
                keys.append(slice(max(0, first - self.expand), min(side, first + self.window + self.expand)))
                near.append(_moved(keys[-1], self.expand - first))
                pooled.append(slice(max(0, index - focal), min(count, index + focal + 1)))
                coarse.append(_moved(pooled[-1], focal - index))
            yield Window(*((first, second) for first, second in (queries, keys, near, pooled, coarse)))


Rectangle = tuple[slice, slice]


class Window(NamedTuple):
    """Rectangles of rows and columns."""

    queries: Rectangle
    """Of the grid."""
    keys: Rectangle
    near: Rectangle
    """The same keys, counted from the first one that a window in the middle of a grid has."""
    pooled: Rectangle
    """Of the windows."""
    coarse: Rectangle
    """The same, counted from the first one that a window in the middle of a grid has."""

    def near_bias(self, bias: Tensor, window: int) -> Tensor:
        """Of all windows [heads, window^2, E, E] -> of this one [heads, queries, keys]."""
        return self._of_queries(bias, window)[..., *self.near].flatten(-2).flatten(1, 2)

    def coarse_bias(self, bias: Tensor, window: int) -> Tensor:
        """Of all windows [heads, window^2, f, f] -> of this one [heads, queries, pooled windows]."""
        return self._of_queries(bias, window)[..., *self.coarse].flatten(-2).flatten(1, 2)

    def _of_queries(self, bias: Tensor, window: int) -> Tensor:
        high, wide = (span.stop - span.start for span in self.queries)
        return bias.unflatten(1, (window, window))[:, :high, :wide]


def _moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def attend_in_windows(layout: Layout, qkv: Tensor, pooled: Tensor, near: Tensor, coarse: Tensor) -> Tensor:
    """Focal attention of the grid's queries, [B, h * w, heads, d].

    Args:
        qkv: queries, keys and values of all tokens, [B, N, 3, heads, d].
        pooled: keys and values of the pooled windows, [B, rows, columns, 2, heads, d].
        near: bias of the keys in and around a window, [heads, window^2, E, E].
        coarse: bias of the pooled windows around it, [heads, window^2, f, f].
    """
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        qkv, pooled, near, coarse = (tensor.to(kind) for tensor in (qkv, pooled, near, coarse))
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _InWindows.apply(layout, qkv, pooled, near, coarse)
        return output


class _InWindows(torch.autograd.Function):
    """Saves its inputs and the weights for the backward pass."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, layout: Layout, qkv: Tensor, pooled: Tensor, near: Tensor, coarse: Tensor) -> Tensor:
        output = qkv.new_empty(len(qkv), layout.height, layout.width, *qkv.shape[3:])
        kept = []
        for window, images in _chunks(layout, qkv):
            query, key, value = _gathered(layout, window, qkv[images], pooled[images])
            logits = torch.bmm(query, key.transpose(1, 2)).unflatten(0, (-1, qkv.shape[3]))
            logits += _bias(layout, window, near, coarse)
            weights = logits.softmax(-1).flatten(0, 1)
            target = output[images][:, *window.queries]
            target.copy_(_scattered(torch.bmm(weights, value), target))
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(qkv, pooled, *kept)
        ctx.layout, ctx.shapes = layout, (near.shape, coarse.shape)
        return output.flatten(1, 2)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (qkv, pooled, *kept), layout = ctx.saved_tensors, ctx.layout
        heads = qkv.shape[3]
        at_least_single = torch.promote_types(qkv.dtype, torch.float32)
        by_near, by_coarse = (qkv.new_zeros(shape, dtype=at_least_single) for shape in ctx.shapes)
        by_qkv, by_pooled = torch.zeros_like(qkv), torch.zeros_like(pooled)
        grad = grad.unflatten(1, (layout.height, layout.width))
        for (window, images), weights in zip(_chunks(layout, qkv), kept, strict=True):
            query, key, value = _gathered(layout, window, qkv[images], pooled[images])
            by_output = _heads_first(grad[images][:, *window.queries].flatten(1, 2)).flatten(0, 1)
            by_weights = torch.bmm(by_output, value.transpose(1, 2))
            by_logits = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_bias = by_logits.unflatten(0, (-1, heads)).sum(0, dtype=at_least_single)
            count = by_bias.shape[-1] - layout.prefix
            coarse_count = math.prod(span.stop - span.start for span in window.pooled)
            for total, rectangle, part in (
                (by_near, window.near, by_bias[..., : count - coarse_count]),
                (by_coarse, window.coarse, by_bias[..., count - coarse_count : count]),
            ):
                target = window._of_queries(total, layout.window)[..., *rectangle]
                target += part.reshape(target.shape)
            patches = by_qkv[images, layout.prefix :].unflatten(1, (layout.height, layout.width))
            target = patches[:, *window.queries, 0]
            target.copy_(_scattered(torch.bmm(by_logits, key), target).mul_(query.shape[-1] ** -0.5))
            for part, gradient in (
                (0, torch.bmm(by_logits.transpose(1, 2), query)),
                (1, torch.bmm(weights.transpose(1, 2), by_output)),
            ):
                targets = (
                    patches[:, *window.keys, 1 + part],
                    by_pooled[images][:, *window.pooled, part],
                    by_qkv[images, : layout.prefix, 1 + part],
                )
                sizes = [target.shape[1:-2].numel() for target in targets]
                for target, rows in zip(targets, gradient.split(sizes, 1), strict=True):
                    target += _scattered(rows, target)
        return None, by_qkv, by_pooled, by_near, by_coarse


def _chunks(layout: Layout, qkv: Tensor) -> Iterator[tuple[Window, slice]]:
    """Each window with some of the images at a time."""
    reach = layout.window + 2 * layout.expand
    logits = layout.window**2 * (reach**2 + layout.focal_window**2 + layout.prefix) * qkv.shape[3]
    images = max(1, LOGITS_PER_THREAD * torch.get_num_threads() // logits)
    for start in range(0, len(qkv), images):
        for window in layout.windows():
            yield window, slice(start, start + images)


def _gathered(layout: Layout, window: Window, qkv: Tensor, pooled: Tensor) -> list[Tensor]:
    """The scaled queries of a window, its keys and values, [B * heads, tokens, d] each."""
    patches = qkv[:, layout.prefix :].unflatten(1, (layout.height, layout.width))
    gathered = [_heads_first(patches[:, *window.queries, 0].flatten(1, 2)).mul_(qkv.shape[-1] ** -0.5)]
    for part in range(2):
        parts = (
            patches[:, *window.keys, 1 + part].flatten(1, 2),
            pooled[:, *window.pooled, part].flatten(1, 2),
            qkv[:, : layout.prefix, 1 + part],
        )
        gathered.append(_heads_first(torch.cat(parts, 1)))
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
