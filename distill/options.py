"""Base classes of a recipe's sections and of variants' options. No torch.

A variant's module has a `class Options`, a subclass of one of these, with a help text for each key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are strict, values are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _visible(text: str) -> str:
    """Refuse control characters, since names and paths are shown on consoles and pages."""
    if any(ord(character) < 32 or character in _INVISIBLE for character in text):
        raise ValueError("should have no control characters in it")
    return text


_INVISIBLE = frozenset(map(chr, (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))))
Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_visible)]
Side = Annotated[int, Field(gt=0, le=10_000)]
"""Of an image or a patch, in pixels."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Key = tuple[str | int, ...]


def dotted(key: Key) -> str:
    """A recipe's path as users write it."""
    return ".".join(map(str, key))


class Problem(NamedTuple):
    """Values that do not fit together."""

    keys: tuple[Key, ...]
    """The recipe paths involved; the problem is reported under the first."""
    message: str


class Options(Section):
    """Options of a variant in a recipe."""

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        """Problems of this section, at the path `at`, with the rest of the recipe. Must not import torch."""
        return iter(())


class Grid(NamedTuple):
    """Tokens of a student's blocks, as far as the recipe defines them."""

    depth: int
    """Number of blocks."""
    side: int | None
    """Of the square patch grid; None: patches do not fit the image."""
    prefix_tokens: int


class AnyAttention(Options):
    """`student.attention` of any kind."""

    kind: str

    def check_grid(self, grid: Grid, recipe: Any, at: Key) -> Iterator[Problem]:
        """Problems with this grid. Must not import torch."""
        return iter(())


class StandardAttention(AnyAttention):
    """The model's own attention in all of its blocks."""

    kind: Literal["standard"] = Field("standard", description="Softmax attention over tokens.")


class AttentionOptions(AnyAttention):
    """Base of the options of an attention kind: `kind: Literal["name"]` is its discriminator."""

    blocks: list[int] | Literal["all"] = Field(
        [0, 1], description="Blocks, counted from 0, that use this attention, or 'all'."
    )

    def chosen(self, depth: int) -> list[int]:
        """The blocks of a student of this depth that use this attention."""
        return list(range(depth)) if isinstance(self.blocks, str) else self.blocks

    def check_grid(self, grid: Grid, recipe: Any, at: Key) -> Iterator[Problem]:
        blocks = self.chosen(grid.depth)
        if wrong := [block for block in blocks if not 0 <= block < grid.depth]:
            model = recipe.student.model
            yield Problem(
                ((*at, "blocks"), ("student", "model")), f"{model} has blocks 0 to {grid.depth - 1}, got {wrong}"
            )
        if len(set(blocks)) != len(blocks):
            yield Problem(((*at, "blocks"),), f"duplicate block in {blocks}")


class StudentOptions(Options):
    """`student` in a recipe; base of the options of student families."""

    family: ClassVar[str] = "timm_model"
    """The variant that builds the student."""
    models: ClassVar[Sequence[str]] = ()
    """Values of `model` for this variant; other names are timm's."""
    model: Text = Field(
        "vit_tiny",
        description="vit_nano, micro, tiny, small, base, large, huge, a pyramid (focal_nano, ...), or any timm name.",
    )
    patch_size: Side | None = Field(None, description="Patch side in pixels of a vit_* student; null: 16.")
    stem: Literal["patch", "conv"] = Field(
        "patch",
        description="'patch': one patch projection; 'conv': 3x3 convolutions to the same grid (Xiao et al. 2021).",
    )
    attention: AnyAttention = Field(StandardAttention(), description="The attention of the student's blocks.")
    distillation_token: bool | None = Field(
        None,
        description="DeiT's second token and head, of a pyramid the second head on its features; null: yes for vit_* "
        "and pyramids, except in a run without labels; cannot be set for other models.",
    )
    drop_path: float = Field(
        0.0, ge=0.0, lt=1.0, description="Stochastic depth rate of the last block, rising linearly from 0."
    )
    pretrained: bool = Field(False, description="Start from timm's weights for this model.")
    weights: Text | None = Field(None, description="Start from an earlier export folder.")

    def grid(self, resolution: int) -> Grid | None:
        """Its token grid; None: not known before it is built."""
        return None

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        if self.pretrained and self.weights is not None:
            yield Problem(
                ((*at, "pretrained"), (*at, "weights")), "start from timm's weights or from an export, not from both"
            )
        if self.distillation_token and recipe.label_free:
            yield Problem(
                ((*at, "distillation_token"), ("label_weight",), ("distill",)),
                "without labels and methods on logits the student has no head to distil into; leave it out",
            )


class SourceOptions(Options):
    """Base of the options of a teacher source: `source: Literal["name"]` is its discriminator."""

    source: str


class WeightSchedule(Section):
    start: NonNegative = Field(1.0, description="Weight at the first step.")
    end: NonNegative = Field(0.0, description="Weight from `until` on.")
    until: Annotated[Probability, Field(gt=0.0)] = Field(
        1.0, description="Fraction of the run after which it is `end`."
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="Interpolation from `start` to `end`.")

    def at(self, progress: float) -> float:
        """The weight at `progress`, 0 to 1, of the run."""
        way = min(1.0, progress / self.until)
        if self.shape == "cosine":
            way = (1.0 - math.cos(math.pi * way)) / 2.0
        return self.start + (self.end - self.start) * way

    @property
    def mean(self) -> float:
        """Mean over the run; both shapes have the same mean."""
        return self.until * (self.start + self.end) / 2.0 + (1.0 - self.until) * self.end


def _weight_shape(value: Any) -> str:
    return "schedule" if isinstance(value, dict | WeightSchedule) else "number"


Weight = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[WeightSchedule, Tag("schedule")], Discriminator(_weight_shape)
]


def weight(default: float | WeightSchedule) -> Any:
    """The field of a method's weight with this default."""
    return Field(default, description="Weight in the loss, a number or a schedule over the run.")


class Needs(NamedTuple):
    """What a method needs in a step."""

    logits: bool = False
    """The teacher's logits; the method then trains the student's distillation head, else its only head."""
    maps: bool = False
    """Feature maps of the teacher."""
    views: int | Literal["all"] = 1
    """Augmented views of each image; "all": those that `data.views` names. Then the frozen teacher answers for as many
    as the other methods need, at least for the first one, and these views have the student's feature maps too.
    """
    compares_samples: bool = False
    """Whether samples of a micro-batch are compared, so that its size matters."""
    labels: bool = False
    """Whether it needs the label of each image, and so cannot learn from images without one."""
    embedding: bool = False
    """The student's `Features.embedding` and `Features.regions`."""
    average: bool = False
    """The student's moving average, asked for the global views (`teacher.ema`)."""


class MethodOptions(Options):
    """Base of the options of a distillation method: `method: Literal["name"]` is its discriminator."""

    needs: ClassVar[Needs] = Needs()
    method: str
    weight: Weight = weight(1.0)

    def weight_at(self, progress: float) -> float:
        """The weight at `progress`, 0 to 1, of the run."""
        return self.weight.at(progress) if isinstance(self.weight, WeightSchedule) else self.weight

    def has_ended(self, progress: float) -> bool:
        """Whether the weight is 0 from `progress`, 0 to 1, of the run on."""
        schedule = self.weight
        return isinstance(schedule, WeightSchedule) and schedule.end == 0 and progress >= schedule.until

    @property
    def mean_weight(self) -> float:
        return self.weight.mean if isinstance(self.weight, WeightSchedule) else self.weight

    def arguments(self) -> dict[str, Any]:
        """The options of the method itself, by name."""
        return self.model_dump(exclude={"method", "weight", "pairs"})

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        if not self.needs.maps:
            return
        method = f"{self.method} learns from feature maps of the teacher"
        if len(recipe.teachers) > 1:
            yield Problem((at, ("teacher",)), f"{method}, and an ensemble has none of its own; name a single teacher")
        elif recipe.teachers and recipe.teachers[0].cache:
            path: Key = ("teacher", 0) if isinstance(recipe.teacher, list) else ("teacher",)
            yield Problem(((*path, "cache"), at), f"{method}, and only logits are stored; set teacher.cache to false")


class LogitsOptions(MethodOptions):
    """Base of the options of a method on logits."""

    needs = Needs(logits=True)


class Pair(Section):
    block: int | None = Field(
        None, ge=0, description="Block of the student, counted from 0; of a CNN, its stage; null: the last."
    )
    map: Text | None = Field(
        None, description="Feature map of the teacher; `distill teachers NAME` lists them; null: the last."
    )


class MapsOptions(MethodOptions):
    """Base of the options of a method on feature maps."""

    needs = Needs(maps=True)
    pairing: ClassVar[Literal["all", "middle", "last"]] = "all"
    """Default pairs: all maps, spread evenly over the blocks, or one pair."""
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = Field(
        None, description="Blocks of the student and maps of the teacher; null: as the method's paper pairs them."
    )

    def named_maps(self) -> Sequence[str]:
        return [pair.map for pair in self.pairs or () if pair.map is not None]

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        grid = recipe.student.grid(recipe.data.resolution)
        blocks = [pair.block for pair in self.pairs or () if pair.block is not None]
        if grid is not None and (wrong := [block for block in blocks if block >= grid.depth]):
            yield Problem(
                ((*at, "pairs"), ("student", "model")),
                f"{recipe.student.model} has blocks 0 to {grid.depth - 1}, got {wrong}",
            )


class ProjectedOptions(MapsOptions):
    """Base of the options of a method that projects the student's channels to the teacher's."""

    projection: Literal["orthogonal"] | None = Field(
        None,
        description="'orthogonal': onto orthonormal directions, which keeps distances and angles, to standardised maps "
        "of the teacher (VkD, Miles et al. 2024); weights as guide's suit it. null: linear.",
    )


class SelfDistillationOptions(MethodOptions):
    """Base of the options of a method that compares views of an image with the student's moving average."""

    needs = Needs(views="all", embedding=True, average=True)
    prototypes: int = Field(
        1024, gt=1, le=1_000_000, description="Outputs of the head; the paper has 65,536 for ImageNet."
    )
    hidden: int = Field(512, gt=0, le=100_000, description="Width of the head's hidden layers; the paper has 2,048.")
    bottleneck: int = Field(256, gt=0, le=100_000, description="Width of the head's last layer's inputs.")
    student_temperature: Positive = Field(0.1, description="Divides the student's logits.")
    teacher_temperature: Positive = Field(0.04, description="Divides the teacher's, in the first epoch.")
    teacher_temperature_end: Positive = Field(
        0.07, description="The same after the warm-up, to which it rises epoch by epoch."
    )
    temperature_warmup_epochs: int = Field(10, ge=0, description="Epochs of that warm-up; 30 in the paper.")
    center_momentum: Probability = Field(0.9, description="Momentum of the centre of the teacher's logits.")
    freeze_last_epochs: int = Field(1, ge=0, description="First epochs in which the head's last layer does not learn.")
    norm_last_layer: bool = Field(
        True, description="The last layer's rows have length 1; false: lengths are learned (in the paper with ViT-S)."
    )

    def teacher_temperature_at(self, epoch: float) -> float:
        """In an epoch, from 0: evenly spaced values from the first to the last epoch of the warm-up."""
        start, end, last = self.teacher_temperature, self.teacher_temperature_end, self.temperature_warmup_epochs - 1
        if last < 0 or int(epoch) > last:
            return end
        return start + (end - start) * int(epoch) / max(1, last)

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        if recipe.data.global_views < 2:
            found = "it names none" if recipe.data.views is None else f"it has {recipe.data.global_views}"
            yield Problem(
                (("data", "views"), at), f"{self.method} compares at least two global views of an image; {found}"
            )
        for key in ("mixup", "cutmix"):
            if recipe.data.views is None and getattr(recipe.data.augment, key):
                yield Problem((("data", "augment", key), at), f"{self.method} compares views of one image; set it to 0")
