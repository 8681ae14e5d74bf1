"""Batch norms of attention maps, and the refinement of maps on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class MapNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics are the plain mean of the batches so far, until that is slower than the
    momentum. From the first step on they are those of real maps.

    Attention maps have variances of 1e-6 and less at first. Running statistics that begin as published, with variance
    1, approach it by a factor of 0.9 a step: for a hundred steps evaluation normalises by something else than training.
    In evaluation this is an ordinary batch norm.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape; in training with the statistics of this batch."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        self.observe(mean, variance, x.numel() // x.shape[1])
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @torch.no_grad()
    def observe(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics by those of `count` values a channel, the variance without correction."""
        self.num_batches_tracked.add_(1)
        share = (1 / self.num_batches_tracked.to(mean.dtype)).clamp(min=self.momentum)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share.to(self.running_mean.dtype))
        self.running_var.lerp_(
            (variance * count / max(1, count - 1)).to(self.running_var.dtype), share.to(self.running_var.dtype)
        )

    def folded(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and summand, [C, 1] each, that normalise by these statistics."""
        factor = self.weight * (variance + self.eps).rsqrt()
        return factor[:, None], (self.bias - mean * factor)[:, None]


LEAST_IMAGES = 16
"""From which on images last is the faster order: the width of a CPU's vectors."""


def refine_on_cpu(
    maps: Tensor, expand: nn.Conv2d, depthwise: nn.Conv2d, reduce: nn.Conv2d, norms: tuple[MapNorm, ...]
) -> Tensor:
    """output_norm(reduce_norm(reduce(relu6(depthwise_norm(depthwise(relu6(expand_norm(expand(maps)))))))) + maps), for
    maps [B, heads, N, N].

    With the images last, 1x1 convolutions are single matrix products and the other one is depthwise over contiguous
    images: a fraction of the time that torch takes for the usual order. The first norm needs no expanded maps: their
    means and variances follow from the means and covariances of the maps.
    """
    batch, heads, height, width = maps.shape
    first, second, third, last = norms
    rows = maps.permute(1, 2, 3, 0).reshape(heads, -1)
    weight = expand.weight.flatten(1)
    centre = rows.detach().mean(1, keepdim=True)  # a constant: small variances beside large means lose precision
    rows = rows - centre
    if first.training:
        mean, covariance = _Moments.apply(rows)
        means, variances = weight @ (mean + centre), ((weight @ covariance) * weight).sum(1)
        first.observe(means.detach()[:, 0], variances.detach(), rows.shape[1])
        factor, summand = first.folded(means[:, 0], variances)
    else:
        factor, summand = first.folded(first.running_mean, first.running_var)
    summand = summand + factor * (weight @ centre)
    shape = (height, width, batch)
    kernels, matrix = depthwise.weight, reduce.weight.flatten(1)
    if second.training:
        norm = (second.weight, second.bias, second.eps)
        reduced, mean, variance = _Hidden.apply(shape, rows, factor * weight, summand, kernels, *norm, matrix)
        second.observe(mean, variance, rows.shape[1])
    else:
        hidden = torch.addmm(summand, factor * weight, rows).clamp_(0, 6)
        convolved = [_convolved(row.view(shape), kernel).flatten() for row, kernel in zip(hidden, kernels, strict=True)]
        factor, summand = second.folded(second.running_mean, second.running_var)
        reduced = matrix @ (torch.stack(convolved) * factor + summand).clamp_(0, 6)
    refined = _normalised(_normalised(reduced, third) + rows + centre, last)
    return refined.view(heads, *shape).permute(3, 0, 1, 2)


def _normalised(x: Tensor, norm: MapNorm) -> Tensor:
    """Batch norm of rows [C, M]."""
    if not norm.training:
        factor, summand = norm.folded(norm.running_mean, norm.running_var)
        return x * factor + summand
    output, mean, variance = _Normalised.apply(x, norm.weight, norm.bias, norm.eps)
    norm.observe(mean, variance, x.shape[1])
    return output


class _Moments(torch.autograd.Function):
    """Rows [C, M] -> mean [C, 1] and covariance [C, C]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.mean(1, keepdim=True)
        ctx.save_for_backward(rows, mean)
        return mean, rows @ rows.T / rows.shape[1] - mean @ mean.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor, by_covariance: Tensor) -> Tensor:
        rows, mean = ctx.saved_tensors
        matrix = (by_covariance + by_covariance.T) / rows.shape[1]
        return torch.addmm(by_mean / rows.shape[1] - matrix @ mean, matrix, rows)


class _Hidden(torch.autograd.Function):
    """The hidden maps in training: rows [C, M] of maps, M = N * N * B ->

        reduce relu6(norm(depthwise relu6(matrix rows + summand)))

    and mean and variance of the norm's input. The rows of each hidden map are worked off while they are in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, shape: tuple[int, int, int], rows: Tensor, matrix: Tensor, summand: Tensor, kernels: Tensor,
        weight: Tensor, bias: Tensor, eps: float, reduce: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        expanded = torch.addmm(summand, matrix, rows).clamp_(0, 6)
        convolved, hidden, statistics = [], torch.empty_like(expanded), []
        for index, target in enumerate(hidden):
            convolved.append(_convolved(expanded[index].view(shape), kernels[index]).flatten())
            statistics.append(_normalise(convolved[-1], target, weight[index], bias[index], eps))
            target.clamp_(0, 6)
        mean, variance = torch.tensor(statistics, dtype=rows.dtype).T
        ctx.save_for_backward(rows, matrix, kernels, weight, reduce, expanded, hidden, *convolved)
        ctx.shape, ctx.eps, ctx.statistics = shape, eps, statistics
        ctx.mark_non_differentiable(mean, variance)
        return reduce @ hidden, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, matrix, kernels, weight, reduce, expanded, hidden, *convolved = ctx.saved_tensors
        by_expanded = reduce.T @ grad
        by_kernels, by_norm = torch.empty_like(kernels), []
        for index, row in enumerate(by_expanded):
            by_output = torch.ops.aten.hardtanh_backward(row, hidden[index], 0, 6)
            by_norm.append(_normalise_backward(
                by_output, convolved[index], by_output, weight[index], ctx.statistics[index], ctx.eps
            ))  # fmt: skip
            found = _convolved_backward(by_output.view(ctx.shape), expanded[index].view(ctx.shape), kernels[index])
            by_kernels[index].copy_(found[1])
            torch.ops.aten.hardtanh_backward.grad_input(found[0].flatten(), expanded[index], 0, 6, grad_input=row)
        by_weight, by_bias = torch.tensor(by_norm, dtype=grad.dtype).T
        return (
            None, matrix.T @ by_expanded, by_expanded @ rows.T, by_expanded.sum(1, keepdim=True), by_kernels,
            by_weight, by_bias, None, grad @ hidden.T,
        )  # fmt: skip


class _Normalised(torch.autograd.Function):
    """Batch norm of rows [C, M] with their own statistics; and their mean and variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.empty_like(x)
        ctx.statistics = [_normalise(*row, eps) for row in zip(x, output, weight, bias, strict=True)]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        mean, variance = torch.tensor(ctx.statistics, dtype=x.dtype).T
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x = torch.empty_like(x)
        found = [_normalise_backward(*row, ctx.eps) for row in zip(grad, x, by_x, weight, ctx.statistics, strict=True)]
        by_weight, by_bias = torch.tensor(found, dtype=x.dtype).T
        return by_x, by_weight, by_bias, None


def _normalise(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[float, float]:
    """Write a row [M], normalised, to `target`; returns its mean and variance."""
    mean = x.mean().item()
    torch.sub(x, mean, out=target)
    variance = (torch.dot(target, target) / len(x)).item()
    target.mul_(weight.item() * (variance + eps) ** -0.5).add_(bias.item())
    return mean, variance


def _normalise_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor, statistics: tuple[float, float], eps: float
) -> tuple[float, float]:
    """Write the gradient of a row [M] to `target`, which may be `grad`; returns those of weight and bias."""
    mean, variance = statistics
    inverse = (variance + eps) ** -0.5
    centred = x - mean
    by_weight, by_bias = torch.dot(grad, centred).item() * inverse, grad.sum().item()
    # weight * inverse * (grad - by_bias / M - normalised x * by_weight / M)
    outer = weight.item() * inverse
    torch.mul(grad, outer, out=target).add_(centred, alpha=-outer * inverse * by_weight / len(x))
    target.sub_(outer * by_bias / len(x))
    return by_weight, by_bias


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """[H, W, B] by a kernel [1, k, k], of the same size."""
    batch = x.shape[-1]
    kernels = kernel.expand(batch, -1, -1, -1)
    found = F.conv2d(_channels_last(x), kernels, padding=kernel.shape[-1] // 2, groups=batch)
    return found[0].permute(1, 2, 0)


def _convolved_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [H, W, B] and [1, k, k] of `_convolved`."""
    batch, around = x.shape[-1], [kernel.shape[-1] // 2] * 2
    by_x, by_kernels, _ = torch.ops.aten.convolution_backward(
        _channels_last(grad), _channels_last(x), kernel.expand(batch, -1, -1, -1), None,
        [1, 1], around, [1, 1], False, [0, 0], batch, [True, True, False],
    )  # fmt: skip
    return by_x[0].permute(1, 2, 0), by_kernels.sum(0)


def _channels_last(x: Tensor) -> Tensor:
    """[H, W, B] -> a view as one image of B channels."""
    return x[None].permute(0, 3, 1, 2)
