"""Hints: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), section 2.2, equation 3."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods.base import MapsMethod, Shapes
from distill.methods.maps import resize
from distill.methods.precision import at_least_float32
from distill.methods.projection import projection_of, standardise
from distill.options import Needs, ProjectedOptions, Weight, weight
from distill.registry import register


class Options(ProjectedOptions):
    pairing = "middle"
    method: Literal["fitnet"] = Field(
        "fitnet", description="Hint regression between the middle of student and teacher (Romero et al. 2015)."
    )
    weight: Weight = weight(100.0)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Standardised maps depend on the other samples."""
        return super().needs._replace(compares_samples=self.projection == "orthogonal")


@register("methods", "fitnet", Options)
class Fitnet(MapsMethod):
    def __init__(self, options: Options, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        self.hints = nn.ModuleList(Hint(*of_pair, **self.arguments) for of_pair in self.channels(shapes))

    def compare(self, student_map: Tensor, teacher_map: Tensor, pair: int) -> Tensor:
        loss: Tensor = self.hints[pair](student_map, teacher_map)
        return loss


class Hint(nn.Module):
    """mean((regressor(student_map) - teacher_map)^2), over all elements, in float32. For an orthogonal regressor, which
    has no scale, the teacher's map is standardised.

    The paper has half the sum over the elements, which grows with the maps. Its regressor is a convolution whose kernel
    maps the student's grid to the teacher's; here the teacher's map is resized and the regressor is a 1x1 convolution.

    Args:
        student_channels, teacher_channels: of the maps. The regressor is trained along with the student.
        projection: 'orthogonal' or (None) linear.
    """

    def __init__(self, student_channels: int, teacher_channels: int, projection: str | None = None) -> None:
        super().__init__()
        self.regressor = projection_of(projection, student_channels, teacher_channels)
        self.standardises = projection == "orthogonal"

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """[B, student_channels, h, w], [B, teacher_channels, H, W] -> a scalar, 0 or more."""
        height, width = student_map.shape[2:]
        hint = resize(at_least_float32(teacher_map.detach()), (height, width))
        if self.standardises:
            hint = standardise(hint)
        guess: Tensor = self.regressor(at_least_float32(student_map))
        return F.mse_loss(guess, hint)
