"""Locality guidance: Li et al. 2022, "Locality Guidance for Improving Vision Transformers on Tiny Datasets" (ECCV,
arXiv 2207.10026), section 3.2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distill.objectives.maps import resize
from distill.objectives.precision import at_least_float32


class Guide(nn.Module):
    """mean((P S - standardise(resize(T)))^2), P a linear projection of the student's tokens S to as many channels as T.

    A teacher's channels differ in scale by orders of magnitude, so each gets mean 0 and variance 1 over the batch and
    the grid; the batch is the micro-batch of all processes.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)
        self.over_processes = True

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """A scalar, 0 or more, in float32, 1 where the projection says nothing.

        Args:
            student_map: [B, D, H, W], tokens on the patch grid.
            teacher_map: [B, C, h, w], resized to H x W; no gradient flows into it.
        """
        target = resize(teacher_map.detach(), (student_map.shape[2], student_map.shape[3]))
        target = standardise(target, over_processes=self.over_processes)
        return F.mse_loss(self.projection(at_least_float32(student_map)), target)


def standardise(maps: Tensor, *, over_processes: bool = False) -> Tensor:
    """[B, C, H, W] with mean 0 and variance 1 per channel, over the samples of this process or, collectively, of all;
    a channel that is the same everywhere becomes 0.
    """
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
    if over_processes and dist.is_available() and dist.is_initialized():
        own = torch.stack([mean, variance])
        of_each = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_each, own)
        means, variances = torch.stack(of_each, 1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
    return (maps - mean) * torch.rsqrt(variance + 1e-6)
