"""Options of pyramids: students whose stages have half the grid of the stage before. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from distill.options import Grid, Key, Problem, StudentOptions
from distill.recipe.sizes import MOST_PATCHES_A_SIDE


class PyramidSize(NamedTuple):
    width: int
    """Channels of the first stage; each further stage has twice those of the one before."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    heads: tuple[int, ...]
    """Of each stage's blocks."""
    patch: int
    """Side in pixels of a place of the first stage's grid."""
    window: int
    """Side of an attention window, in places of a stage's grid."""

    def sides(self, resolution: int) -> list[int]:
        """Of each stage's square grid."""
        return [-(-resolution // (self.patch * 2**stage)) for stage in range(len(self.depths))]

    def changed(self, values: Mapping[str, Any]) -> PyramidSize:
        """With these values, lists as tuples, in place of its own."""
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return PyramidSize(**{**self._asdict(), **given})


Number = Annotated[int, Field(gt=0, le=10_000)]
Numbers = Annotated[list[Number], Field(min_length=1, max_length=8)]


class PyramidOptions(StudentOptions):
    """Base of the options of a family of pyramids, whose `sizes` have the names in `models`."""

    sizes: ClassVar[Mapping[str, PyramidSize]] = {}
    width: Number | None = Field(
        None, description="Channels of a pyramid's first stage; each further stage has twice as many; null: its own."
    )
    depths: Numbers | None = Field(None, description="Blocks of each stage of a pyramid; null: its own.")
    heads: Numbers | None = Field(None, description="Attention heads in each stage of a pyramid; null: its own.")
    window: Number | None = Field(
        None, description="Side of a pyramid's attention windows, in places of the grid; null: its own."
    )

    @property
    def size(self) -> PyramidSize:
        """That of the model, as far as the options have none."""
        own = self.sizes[self.model]
        given = {"width": self.width, "depths": self.depths, "heads": self.heads, "window": self.window}
        return own.changed({key: value for key, value in given.items() if value is not None})

    def model_args(self) -> dict[str, Any]:
        """The options that are set, as arguments of the model."""
        own = type(self).model_fields.keys() - StudentOptions.model_fields.keys()
        return {key: value for key in sorted(own) if (value := getattr(self, key)) is not None}

    def grid(self, resolution: int) -> Grid:
        """Of its stages, whose maps stand for those of blocks."""
        size = self.size
        return Grid(len(size.depths), size.sides(resolution)[0] if resolution % size.patch == 0 else None, 0)

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        size = self.size
        for key, is_set, message in (
            ("patch_size", self.patch_size not in (None, size.patch), f"has patches of {size.patch} px; leave it out"),
            ("stem", self.stem != "patch", "has a stem of its own; leave it out"),
            ("attention", self.attention.kind != "standard", "has an attention of its own; kinds are for vit_*"),
            ("pretrained", self.pretrained, "has no weights in timm; set it to false"),
        ):
            if is_set:
                yield Problem(((*at, key), (*at, "model")), f"{self.model} {message}")
        if len(size.heads) != len(size.depths):
            keys = [key for key in ("depths", "heads") if getattr(self, key) is not None]
            yield Problem(
                tuple((*at, key) for key in keys),
                f"one number for each stage in both: {len(size.depths)} depths and {len(size.heads)} heads",
            )
        else:
            widths = [size.width * 2**stage for stage in range(len(size.depths))]
            if wrong := [pair for pair in zip(widths, size.heads, strict=True) if pair[0] % pair[1]]:
                width, heads = wrong[0]
                key = "width" if self.heads is None else "heads"
                yield Problem(((*at, key), (*at, "model")), f"a width of {width} does not divide into {heads} heads")
        if (problem := self._grid_problem(size, recipe, at)) is not None:
            yield problem
        if self.distillation_token is not False and (untaught := recipe.untaught_head()) is not None:
            yield untaught

    def stages_problem(self, key: str, at: Key) -> Problem | None:
        """Whether the option `key`, if it is set, lacks one number for each stage."""
        values, stages = getattr(self, key), len(self.size.depths)
        if values is None or len(values) == stages:
            return None
        message = f"one number for each of {stages} stages, got {len(values)}"
        return Problem(((*at, key), (*at, "depths"), (*at, "model")), message)

    def step(self, size: PyramidSize) -> tuple[int, str]:
        """What images' sides must be multiples of, in pixels, and what that is."""
        return size.patch, "the patch size"

    def _grid_problem(self, size: PyramidSize, recipe: Any, at: Key) -> Problem | None:
        """The first thing that is wrong with the stages' grids, if any."""
        resolution, (step, what) = recipe.data.resolution, self.step(size)
        involved = (("data", "resolution"), (*at, "model"))
        sides = size.sides(resolution)
        if sides[-1] < 2:
            above = size.patch * 2 ** (len(sides) - 1)
            return Problem(
                ((*at, "model"), ("data", "resolution")) if self.depths is None else ((*at, "depths"), *involved),
                f"a pyramid of {len(sides)} stages is too deep for data.resolution {resolution}: its last grid has one "
                f"place; take more than {above} px, or fewer stages",
            )
        if size.window > sides[0]:
            return Problem(
                ((*at, "model") if self.window is None else (*at, "window"), *involved),
                f"a window of {size.window} is larger than the first grid of {sides[0]}x{sides[0]}",
            )
        if resolution % step:
            by_window = self.window is not None and resolution % size.patch == 0
            first = (((*at, "window"),) if by_window else ()) + involved
            return Problem(first, f"data.resolution {resolution} is not divisible by {what} {step}")
        if sides[0] > MOST_PATCHES_A_SIDE:
            most = MOST_PATCHES_A_SIDE
            return Problem(involved, f"{sides[0]}x{sides[0]} patches need too much memory; at most {most}x{most}")
        for side, key in recipe.other_sides.items():
            if side % step:
                return Problem((key, *involved), f"{side} is not divisible by {what} {step}")
        return None
