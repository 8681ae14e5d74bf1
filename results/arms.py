"""The arms that results/README.md compares, one recipe each in recipes/, and what plan.yaml runs and asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from distill.options import Section
from distill.recipe import OPERATIONAL_KEYS, Recipe, load, read_yaml

HERE = Path(__file__).resolve().parent
ARMS = {path.stem: path for path in sorted((HERE / "recipes").glob("*.yaml"))}
TEACHER_ARMS = ("teacher", "clothing-teacher")
"""Arms that come with their students: no campaign runs them, and they have one seed."""


class Cells(Section):
    """Arms, each under all seeds."""

    arms: list[str]
    seeds: list[int]


class Goal(Section):
    says: str
    arm: str
    top1: float | None = Field(None, description="At least, in percent.")
    against: str | None = Field(None, description="Another arm, or 'teacher'.")
    points: float = Field(0.0, description="At least so many more than `against`.")
    p: float | None = Field(None, description="Of that difference, below.")
    minutes: float | None = Field(None, description="Of training, at most.")


class Block(Section):
    """Arms at one budget."""

    name: str = Field(description="Of its files.")
    rows: list[Annotated[list[str], Field(min_length=1, max_length=2)]] = Field(
        description="An arm, and the arm that it is tested against."
    )
    goals: list[Goal] = Field([])
    features: bool = Field(False, description="Whether the table is of features: k-NN, a linear probe, and top-1.")
    classes: bool = Field(False, description="Whether the table has averages over the classes.")
    costs: bool = Field(False, description="Whether the table has what the students cost, measured by results.speed.")


class Question(Section):
    title: str
    asks: str
    blocks: list[Block]


class Plan(Section):
    campaigns: dict[str, list[Cells]]
    questions: list[Question]


PLAN = Plan.model_validate(read_yaml((HERE / "plan.yaml").read_text(encoding="utf-8"), source="plan.yaml"))


def says(arm: str) -> str:
    """What an arm is, by the first line of its recipe."""
    return ARMS[arm].read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def load_arm(arm: str, seed: int, given: Sequence[str] = ()) -> Recipe:
    """What a run of it learns by."""
    return load(ARMS[arm], overrides(arm, seed, given))


def overrides(arm: str, seed: int, given: Sequence[str] = ()) -> list[str]:
    """Those that are given for all arms, such as where the data are, and the seed; an arm without a teacher has no
    weights of one.
    """
    taught = bool(load(ARMS[arm]).teachers)
    return [*(text for text in given if taught or not text.startswith("teacher.")), f"seed={seed}"]


def cells(campaign: str) -> list[tuple[str, int]]:
    """Arms and seeds, in their order."""
    return [(arm, seed) for part in PLAN.campaigns[campaign] for arm in part.arms for seed in part.seeds]


def all_cells() -> Iterator[tuple[str, int]]:
    for campaign in PLAN.campaigns:
        yield from cells(campaign)
    yield from ((arm, 0) for arm in TEACHER_ARMS)


def seeds_of(arm: str) -> list[int]:
    """That an arm is to have."""
    return sorted(seed for name, seed in all_cells() if name == arm)


def identity(recipe: Recipe) -> str:
    """The same for two recipes that learn the same: wherever data and weights lie, whatever runs beside them, and
    whichever precision the machine resolves theirs to.
    """
    weights = {key for key in recipe.flat() if key.startswith("teacher") and key.endswith(".weights")}
    return recipe.digest(OPERATIONAL_KEYS | {"control", "train.precision"} | weights)
