"""The distillation losses that a recipe can name: one section for each method in distill/objectives."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from distill.recipe.base import Probability, Section, Text

NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


class WeightSchedule(Section):
    start: NonNegative = Field(1.0, description="Weight at the first step.")
    end: NonNegative = Field(0.0, description="Weight from `until` on.")
    until: Annotated[Probability, Field(gt=0.0)] = Field(1.0, description="Share of the run after which it is `end`.")
    shape: Literal["linear", "cosine"] = Field("linear", description="Of the way from `start` to `end`.")

    def at(self, progress: float) -> float:
        """The weight after a share `progress`, 0 to 1, of the run."""
        way = min(1.0, progress / self.until)
        if self.shape == "cosine":
            way = (1.0 - math.cos(math.pi * way)) / 2.0
        return self.start + (self.end - self.start) * way

    @property
    def mean(self) -> float:
        """Over the run; either shape is halfway on average."""
        return self.until * (self.start + self.end) / 2.0 + (1.0 - self.until) * self.end


def _weight_shape(value: Any) -> str:
    return "schedule" if isinstance(value, dict | WeightSchedule) else "number"


Weight = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[WeightSchedule, Tag("schedule")], Discriminator(_weight_shape)
]


def _weight(default: float | WeightSchedule) -> Any:
    return Field(default, description="Weight in the loss, a number or its course over the run.")


class _Method(Section):
    """What every method has; the name and the default weight are its own."""

    compares_samples: ClassVar[bool] = False
    """Of a micro-batch with one another, so that its size matters."""
    method: str
    weight: Weight = _weight(1.0)

    def weight_at(self, progress: float) -> float:
        """The weight after a share `progress`, 0 to 1, of the run."""
        return self.weight.at(progress) if isinstance(self.weight, WeightSchedule) else self.weight

    @property
    def mean_weight(self) -> float:
        return self.weight.mean if isinstance(self.weight, WeightSchedule) else self.weight

    def options(self) -> dict[str, Any]:
        """Those of the method itself."""
        return self.model_dump(exclude={"method", "weight", "pairs"})


class OnLogits(_Method):
    """Compares the student's logits, of the distillation head where there is one, with the teacher's."""


class Hard(OnLogits):
    method: Literal["hard"] = Field(
        "hard", description="Cross-entropy with the teacher's decision (Touvron et al. 2021)."
    )
    weight: Weight = _weight(0.5)


class Soft(OnLogits):
    method: Literal["soft"] = Field(
        "soft", description="KL divergence from the teacher's softened output (Hinton et al. 2015)."
    )
    weight: Weight = _weight(0.5)
    temperature: Positive = Field(3.0, description="Softens both outputs; the loss is scaled by its square.")
    standardize: bool = Field(
        False, description="Standardise the logits of each sample first (Sun et al. 2024); weights of 9 suit it."
    )


class Dkd(OnLogits):
    method: Literal["dkd"] = Field("dkd", description="Decoupled distillation (Zhao et al. 2022).")
    weight: Weight = _weight(WeightSchedule(start=0.0, end=1.0, until=0.08))
    alpha: NonNegative = Field(1.0, description="Weight of the part on the target class.")
    beta: NonNegative = Field(8.0, description="Weight of the part on the other classes.")
    temperature: Positive = Field(4.0, description="Softens both outputs; the loss is scaled by its square.")


class Dist(OnLogits):
    compares_samples = True
    method: Literal["dist"] = Field(
        "dist", description="Correlation with the teacher within samples and within classes (Huang et al. 2022)."
    )
    inter: NonNegative = Field(1.0, description="Weight of the correlation over the classes of a sample.")
    intra: NonNegative = Field(1.0, description="Weight of the correlation over the samples of a class.")
    temperature: Positive = Field(1.0, description="Softens both outputs; the loss is scaled by its square.")


class Pair(Section):
    block: int | None = Field(
        None, ge=0, description="Block of the student, counted from 0; of a CNN, its stage; null: the last."
    )
    map: Text | None = Field(
        None, description="Feature map of the teacher; `distill teachers NAME` lists them; null: the last."
    )


class OnMaps(_Method):
    """Compares the student's tokens on the patch grid, after some blocks, with feature maps of the teacher's."""

    pairing: ClassVar[Literal["all", "middle", "last"]]
    """What is compared where no `pairs` are given: all maps, spread evenly over the blocks, or one pair."""
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = Field(
        None, description="Blocks of the student and maps of the teacher; null: as the method's paper pairs them."
    )


class Guide(OnMaps):
    pairing = "all"
    method: Literal["guide"] = Field(
        "guide",
        description="Locality guidance (Li et al. 2022): a projection of the tokens meets all maps of the teacher, "
        "spread evenly over the blocks.",
    )
    weight: Weight = _weight(WeightSchedule(start=2.5, end=0.0, until=0.7))


class Fitnet(OnMaps):
    pairing = "middle"
    method: Literal["fitnet"] = Field(
        "fitnet", description="Hint regression between the middle of student and teacher (Romero et al. 2015)."
    )
    weight: Weight = _weight(100.0)


class AttentionTransfer(OnMaps):
    pairing = "all"
    method: Literal["attention_transfer"] = Field(
        "attention_transfer",
        description="Where all maps, spread evenly over the blocks, are strong (Zagoruyko and Komodakis 2017).",
    )
    weight: Weight = _weight(1000.0)
    power: float = Field(2.0, ge=1.0, description="Of the absolute values that are averaged over the channels.")


class Relational(OnMaps):
    pairing = "last"
    compares_samples = True
    method: Literal["relational"] = Field(
        "relational", description="Distances and angles between samples, of the last maps (Park et al. 2019)."
    )
    distance: NonNegative = Field(25.0, description="Weight of the distances.")
    angle: NonNegative = Field(50.0, description="Weight of the angles.")


class Similarity(OnMaps):
    pairing = "last"
    compares_samples = True
    method: Literal["similarity"] = Field(
        "similarity", description="Which samples are alike, by the last maps (Tung and Mori 2019)."
    )
    weight: Weight = _weight(3000.0)


Objective = Annotated[
    Hard | Soft | Dkd | Dist | Guide | Fitnet | AttentionTransfer | Relational | Similarity, Discriminator("method")
]
