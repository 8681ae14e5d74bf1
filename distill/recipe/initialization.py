"""`student.init`: initial weights of a ViT other than timm's random ones. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field

from distill.options import NonNegative, Section, Text


class Mimetic(Section):
    kind: Literal["mimetic"] = Field(
        "mimetic",
        description="Products of attention's weights near multiples of the identity (Trockman and Kolter 2023).",
    )
    alpha1: NonNegative = Field(
        0.7, description="Of the noise in W_Q W_K^T = alpha1 Z + beta1 I of each head; Z ~ N(0, 1 / width)."
    )
    beta1: NonNegative = Field(0.7, description="Of the identity in it.")
    alpha2: NonNegative = Field(0.4, description="Of the noise in W_V W_proj = alpha2 Z - beta2 I of all heads.")
    beta2: NonNegative = Field(0.4, description="Of the identity in it.")


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("should be odd: it is centred on the patch")
    return value


class Impulse(Section):
    kind: Literal["impulse"] = Field(
        "impulse",
        description="At first each head attends from a patch to the neighbour at one random offset (Zheng et al. "
        "2024, 2025).",
    )
    window: Annotated[int, Field(ge=1, le=31), AfterValidator(_odd)] = Field(
        3, description="Side, in patches, of the window that offsets are drawn from; odd."
    )
    focus: float = Field(
        0.7,
        gt=0.0,
        le=0.9,
        description="Mean attention on that neighbour, of tokens that are nothing but positions.",
    )


class Select(Section):
    kind: Literal["select"] = Field(
        "select", description="Every n-th element of the weights of a larger, trained ViT (Xu et al. 2023)."
    )
    source: Text | None = Field(
        None,
        description="A timm name with weights, or an export folder of this project (with a / in its path); needed.",
    )

    @property
    def folder(self) -> Path | None:
        """The export folder; None: `source` is a timm name."""
        assert self.source is not None, "a loaded recipe has it"
        path = Path(self.source)
        return path if "/" in self.source or path.is_dir() else None


Initialization = Annotated[Mimetic | Impulse | Select, Discriminator("kind")]
