"""Locality guidance: Li et al. 2022, "Locality Guidance for Improving Vision Transformers on Tiny Datasets" (ECCV,
arXiv 2207.10026), section 3.2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods.base import MapsMethod, Shapes
from distill.methods.maps import resize
from distill.methods.precision import at_least_float32
from distill.methods.projection import projection_of, standardise
from distill.options import Needs, ProjectedOptions, Weight, WeightSchedule, weight
from distill.registry import register


class Options(ProjectedOptions):
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
        self.guidance = nn.ModuleList(Guidance(*of_pair, **self.arguments) for of_pair in self.channels(shapes))

    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        loss: Tensor = self.guidance[pair](student_map, teacher_map)
        return loss


class Guidance(nn.Module):
    """mean((P S - standardise(resize(T)))^2), P a linear or orthogonal projection of the student's tokens S to the
    channels of T.

    A teacher's channels differ in scale by orders of magnitude, so each is standardised over the grid and the
    micro-batches of all processes.
    """

    def __init__(self, student_channels: int, teacher_channels: int, projection: str | None = None) -> None:
        super().__init__()
        self.projection = projection_of(projection, student_channels, teacher_channels)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """A scalar, 0 or more, in float32; 1 for tokens that are projected to zeros.

        Args:
            student_map: [B, D, H, W], tokens on the patch grid.
            teacher_map: [B, C, h, w], resized to H x W; no gradient flows into it.
        """
        target = resize(teacher_map.detach(), (student_map.shape[2], student_map.shape[3]))
        return F.mse_loss(self.projection(at_least_float32(student_map)), standardise(target))
