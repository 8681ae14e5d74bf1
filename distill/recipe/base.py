"""Common ground of a recipe's sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Common ground of all sections: unknown keys are errors, types are strict, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _visible(text: str) -> str:
    """Names and paths go to consoles, files and pages: none may steer a terminal, break a line or turn it around."""
    if any(ord(character) < 32 or character in _INVISIBLE for character in text):
        raise ValueError("should have no control characters in it")
    return text


_INVISIBLE = frozenset(map(chr, (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))))
Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_visible)]
Side = Annotated[int, Field(gt=0, le=10_000)]
"""Of an image or a patch, in pixels."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
