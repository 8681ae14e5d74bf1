"""Locality guidance: Li et al. 2022, "Locality Guidance for Improving Vision Transformers on Tiny Datasets" (ECCV,
arXiv 2207.10026), section 3.2."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods.base import MapsMethod, Shapes
from distill.methods.maps import resize
from distill.methods.precision import at_least_float32
from distill.options import MapsOptions, Needs, Weight, WeightSchedule, weight
from distill.registry import register


class Options(MapsOptions):
    needs = Needs(maps=True, compares_samples=True)
    method: Literal["guide"] = Field(
        "guide",
        description="Locality guidance (Li et al. 2022): projected tokens regress all maps of the teacher, spread "
        "evenly over the blocks.",
    )
    weight: Weight = weight(WeightSchedule(start=2.5, end=0.0, until=0.7))


@register("methods", "guide", Options)
class Guide(MapsMethod):
    def __init__(self, options: Options, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        channels = [(shapes.student_channels[block], shapes.teacher_channels[name]) for block, name in self.pairs]
        self.guidance = nn.ModuleList(Guidance(*of_pair) for of_pair in channels)

    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        loss: Tensor = self.guidance[pair](student_map, teacher_map)
        return loss


class Guidance(nn.Module):
    """mean((P S - standardise(resize(T)))^2), P a linear projection of the student's tokens S to the channels of T.

    A teacher's channels differ in scale by orders of magnitude, so each is standardised over the grid and the
    micro-batches of all processes.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """A scalar, 0 or more, in float32; 1 for a projection to zeros.

        Args:
            student_map: [B, D, H, W], tokens on the patch grid.
            teacher_map: [B, C, h, w], resized to H x W; no gradient flows into it.
        """
        target = resize(teacher_map.detach(), (student_map.shape[2], student_map.shape[3]))
        return F.mse_loss(self.projection(at_least_float32(student_map)), standardise(target))


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
