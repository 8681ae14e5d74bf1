"""Attention transfer: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention" (arXiv 1612.03928), section
3.1, equation 2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.methods.base import MapsMethod
from distill.methods.maps import resize
from distill.methods.precision import at_least_float32
from distill.options import MapsOptions, Weight, weight
from distill.registry import register


class Options(MapsOptions):
    method: Literal["attention_transfer"] = Field(
        "attention_transfer",
        description="Spatial attention of all maps, spread evenly over the blocks (Zagoruyko and Komodakis 2017).",
    )
    weight: Weight = weight(1000.0)
    power: float = Field(2.0, ge=1.0, description="Exponent of the absolute values before the mean over channels.")


def attention_transfer(student_map: Tensor, teacher_map: Tensor, power: float) -> Tensor:
    """mean((Q_student - Q_teacher)^2) over samples and positions, in float32, where Q [B, h w] is the mean over
    channels of |map|^power, each sample's divided by its L2 norm.

    As in the published code. The paper's equation 2 has half the norm of the difference, not squared, which does not
    decrease with the number of positions.

    Args:
        student_map: [B, C, h, w].
        teacher_map: [B, any number of channels, H, W], resized to h, w.
        power: 1 or more; larger values emphasise the largest activations.

    Returns:
        A scalar from 0 to 2 / (h w), 0 for equal attention. Invariant to a factor on a sample's map, and to the order
        and sign of channels.
    """
    height, width = student_map.shape[2:]
    teacher_map = resize(at_least_float32(teacher_map.detach()), (height, width))
    return (_attention(student_map, power) - _attention(teacher_map, power)).square().mean()


def _attention(maps: Tensor, power: float) -> Tensor:
    maps = at_least_float32(maps).flatten(2)
    # The scale changes neither result nor gradient, and powers of numbers up to 1 do not overflow.
    peak = maps.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    return F.normalize((maps / peak).abs().pow(power).mean(dim=1), dim=1)


@register("methods", "attention_transfer", Options)
class AttentionTransfer(MapsMethod):
    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        return attention_transfer(student_map, teacher_map, **self.arguments)
