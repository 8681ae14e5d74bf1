"""What methods on maps share: projections of the student's channels to the teacher's, and standardised targets."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def projection_of(kind: str | None, student_channels: int, teacher_channels: int) -> nn.Module:
    """[B, student_channels, h, w] -> [B, teacher_channels, h, w], 'orthogonal' or (None) linear with a bias."""
    if kind == "orthogonal":
        return OrthogonalProjection(student_channels, teacher_channels)
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


class OrthogonalProjection(nn.Module):
    """Products of each token with a matrix of orthonormal columns, or rows to fewer channels: Miles et al. 2024, "VkD:
    Improving Knowledge Distillation using Orthogonal Projections" (CVPR, arXiv 2403.06213), section 3. To as many
    channels or more it keeps all distances and angles between tokens, so the student itself has to learn them.

    The matrix is the Cayley map of a skew-symmetric one, which is learned, as that of torch's
    `parametrizations.orthogonal(..., "cayley", use_trivialization=False)`. The paper has the matrix exponential, which
    costs 5 to 20 times as much. Torch solves a system of the larger number of channels and waits for the device to
    check it; here it is one of the smaller number, and always regular.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.sizes = max(student_channels, teacher_channels), min(student_channels, teacher_channels)
        self.to_fewer = teacher_channels < student_channels
        self.skew = nn.Parameter(torch.randn(self.sizes[0] * self.sizes[1]) * self.sizes[0] ** -0.5)
        """A row of the larger number of channels after the other, of which those above the diagonal do nothing. Flat,
        since optimizers decay matrices, and a decay of this one would pull it to no better place.
        """

    def forward(self, maps: Tensor) -> Tensor:
        return F.conv2d(maps, self.matrix()[:, :, None, None])

    def matrix(self) -> Tensor:
        """[teacher_channels, student_channels].

        With skew-symmetric A = [[S, -M^T], [M, 0]] these are the first columns of (I - A/2)^-1 (I + A/2), which are
        [2 R - I, M R] with R = (I - S/2 + M^T M / 4)^-1. The symmetric part of what is inverted is at least I.
        """
        more, fewer = self.sizes
        square, below = self.skew.view(more, fewer).split([fewer, more - fewer])
        lower = square.tril(-1)
        identity = torch.eye(fewer, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.inv_ex(identity - (lower - lower.mT) / 2 + below.mT @ below / 4).inverse
        columns = torch.cat([2 * inverse - identity, below @ inverse])
        return columns.mT if self.to_fewer else columns


def standardise(maps: Tensor) -> Tensor:
    """[B, C, H, W] -> mean 0 and variance 1 per channel, over the samples of all processes; a constant channel
    becomes 0. Collective.
    """
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
    if dist.is_available() and dist.is_initialized():
        own = torch.stack([mean, variance])
        of_each = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_each, own)
        means, variances = torch.stack(of_each, 1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
    return (maps - mean) * torch.rsqrt(variance + 1e-6)
