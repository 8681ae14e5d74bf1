"""The known teachers of zoo.yaml, validated. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from distill.recipe import read_yaml

_CHANNELS = Field(min_length=1)


class Accuracy(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    top1: float = Field(ge=0, le=100)
    """Percent, on the test split."""
    source: Literal["measured", "published"]


class ZooEntry(BaseModel):
    """Weights, licence, input contract and accuracy of a teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    """A timm name."""
    dataset: str
    num_classes: int = Field(gt=0)
    url: str = Field(pattern=r"^https://.+/[^/]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{8,64}$")
    """The first digits of the file's hash."""
    license: str
    mean: Annotated[tuple[float, ...], _CHANNELS]
    std: Annotated[tuple[float, ...], _CHANNELS]
    size: int = Field(gt=0)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    accuracy: Accuracy


class Recommended(BaseModel):
    """Weights of timm's, as its own configuration describes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: str
    classes: int = Field(ge=0)
    """Of its classifier; 0: it has none."""
    size: int = Field(gt=0)
    parameters: int = Field(gt=0)


_FILE = Path(__file__).with_name("zoo.yaml")
_content = read_yaml(_FILE.read_text(encoding="utf-8"), source=_FILE.name)

RECOMMENDED: dict[str, Recommended] = TypeAdapter(dict[str, Recommended]).validate_python(_content.pop("recommended"))
"""Teachers for methods on feature maps, by timm's name."""
ZOO: dict[str, ZooEntry] = TypeAdapter(dict[str, ZooEntry]).validate_python(_content)
"""Known teachers by `teacher.model`."""
