"""Runs of the same recipe under several seeds, which are one answer to one question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distill.recipe import OPERATIONAL_KEYS
from distill.report.comparison import Comparison, Row


@dataclass(frozen=True)
class Group:
    """Runs whose recipes are the same but for their seed and for what only names or runs them."""

    name: str
    """Of the first run."""
    runs: Mapping[int, str]
    """By seed; one run of seed 0 where the recipe is not known."""

    def students(self, comparison: Comparison) -> dict[int, Row]:
        return self._found(lambda name: comparison.row(name, "student"))

    def controls(self, comparison: Comparison) -> dict[int, Row]:
        return self._found(comparison.control_of)

    def teachers(self, comparison: Comparison) -> dict[int, Row]:
        return self._found(comparison.teacher_of)

    def _found(self, of: Callable[[str], Row | None]) -> dict[int, Row]:
        """By seed, what the runs have of it."""
        return {seed: row for seed, name in self.runs.items() if (row := of(name)) is not None}


def groups_of(comparison: Comparison) -> list[Group]:
    """All runs, in their order; of two of the same recipe and seed the second is a group by itself."""
    found: dict[str, dict[int, str]] = {}
    for name, run in comparison.runs.items():
        if (recipe := run.known_recipe) is None:
            found[name] = {0: name}
            continue
        digest = recipe.digest(OPERATIONAL_KEYS | {"seed", "control"})
        by_seed = found.setdefault(digest, {})
        if recipe.seed in by_seed:
            found[name] = {recipe.seed: name}
        else:
            by_seed[recipe.seed] = name
    return [Group(next(iter(by_seed.values())), by_seed) for by_seed in found.values()]
