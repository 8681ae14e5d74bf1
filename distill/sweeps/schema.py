"""The sweep file: its keys, and the recipe that it varies; all problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from distill.errors import InputError
from distill.options import Section, Text
from distill.recipe import Recipe, read_mapping
from distill.recipe.inheritance import with_bases
from distill.recipe.loading import Problem, listed, load, overridden, plain_message, resolve
from distill.sweeps import axes
from distill.sweeps.axes import SEED, Axis, Range, Values

MOST_TRIALS = 100


class Hyperband(Section):
    """Early stopping of trials that fall behind (Li et al. 2018), by Optuna's HyperbandPruner."""

    method: Literal["hyperband"] = "hyperband"
    min_epochs: int = Field(1, ge=1, description="Epochs that a trial has before it may be stopped.")
    factor: int = Field(3, ge=2, description="One in so many goes on from each rung to the next.")


class SweepFile(Section):
    """What a sweep file may hold."""

    base: Text = Field(description="The recipe that the trials change; relative to this file.")
    search: Literal["grid", "random", "tpe"] = Field("grid", description="grid: all combinations.")
    keys: dict[Text, Any] = Field({}, description="Dotted keys of the recipe: a list of values, or a range.")
    trials: int | None = Field(None, ge=1, description="Number of runs of random and tpe, all seeds counted.")
    parallel: int | None = Field(None, ge=1, le=1024, description="At a time; null: one on each GPU, else one.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the search itself.")
    stop: Hyperband | None = Field(None, description="hyperband, or {method: hyperband, min_epochs: 1, factor: 3}.")
    minutes: float | None = Field(
        None, gt=0, description="Stop each trial after so many minutes of training, and rank it by what it reached."
    )
    executor: Literal["processes", "slurm", "local"] = Field(
        "processes", description="processes of this command, or submitit's: slurm, and local to try it."
    )
    options: dict[Text, Any] = Field({}, description="Of submitit's executor, such as slurm_partition, timeout_min.")
    command: list[Text] | None = Field(
        None, min_length=1, description="What starts a trial, such as [accelerate, launch, -m, distill.train]."
    )


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    options: SweepFile
    axes: tuple[Axis, ...]
    """Without the seeds."""
    seeds: tuple[int, ...]
    """Of the recipe; one at least."""
    recipe: Mapping[str, Any]
    """The base with its own bases and the overrides merged, as plain data."""
    resolved: Recipe
    samples: tuple[Recipe, ...]
    """Recipes of trials, in which each value occurs."""
    source: str
    plugins: Sequence[str] = ()

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """All configurations of a grid."""
        return axes.grid([found for found in self.axes if isinstance(found, Values)])

    @property
    def total(self) -> int:
        """Number of trials: configurations times seeds."""
        if self.options.search == "grid":
            return len(self.cells) * len(self.seeds)
        assert self.options.trials is not None, "checked"
        return self.options.trials

    @property
    def tested(self) -> bool:
        """Whether the chosen configuration is finished with its test; trials that are cut short are not."""
        return self.options.minutes is None

    def identity(self) -> str:
        """What must stay the same when a sweep goes on."""
        kept = self.options.model_dump(exclude={"base", "parallel", "executor", "options", "command"})
        return yaml.safe_dump({**kept, "recipe": dict(self.recipe)}, sort_keys=False)

    def overrides(self, values: Mapping[str, Any], seed: int) -> list[str]:
        """Those of a trial, without its test."""
        given = [*axes.overrides(values), f"{SEED}={seed}"]
        recipe, _ = resolve(self.recipe, [*given, "control=false"])
        control = recipe is not None and bool(recipe.distill) and not recipe.label_free
        return [*given, f"control={str(control).lower()}"]


def read_sweep(
    path: Path, overrides: Sequence[str] = (), *, max_trials: int = MOST_TRIALS, plugins: Sequence[str] = ()
) -> Sweep:
    """Read and check the sweep file at `path`; `overrides` are of the base recipe.

    Raises:
        InputError: it cannot be read, or lists all of its problems.
    """
    given = read_mapping(path)
    base = given.get("base")
    if isinstance(base, str):
        given = {**given, "base": str(path.parent / base)}
    return check_sweep(given, overrides, source=str(path), max_trials=max_trials, plugins=plugins)


def check_sweep(
    given: Mapping[Any, Any],
    overrides: Sequence[str] = (),
    *,
    source: str,
    max_trials: int = MOST_TRIALS,
    plugins: Sequence[str] = (),
) -> Sweep:
    """A sweep given as plain data, whose `base` is relative to the working directory.

    Raises:
        InputError: lists all of its problems.
    """
    options, problems = _options(given)
    keys = given.get("keys") if options is None else options.keys
    found = [axes.axis(str(key), values) for key, values in keys.items()] if isinstance(keys, Mapping) else []
    problems += [problem for problem in found if isinstance(problem, Problem)]
    if options is None:
        raise InputError(listed(problems, source, "sweep"))
    varied = [one for one in found if isinstance(one, Values | Range)]
    if options.search == "grid":
        values = [axes.listed_values(one) for one in varied]
        problems += [problem for problem in values if isinstance(problem, Problem)]
        varied = [one for one in values if isinstance(one, Values)]
    seeds, seed_problems = _seeds(varied)
    others = tuple(one for one in varied if one.key != SEED)
    problems += [*seed_problems, *_numbers(options, others, seeds, max_trials)]
    raw, resolved = _base(Path(options.base), overrides)
    if problems:  # the combinations may be many, or none
        problems += _problems_of_values(raw, others)
        raise InputError(listed(problems, source, "sweep"))
    problems += _problems_of_recipe(resolved, varied)
    seeds, corners = seeds or (resolved.seed,), _corners(others)
    cells = axes.grid([one for one in others if isinstance(one, Values)]) if options.search == "grid" else []
    samples: list[Recipe] = []
    for cell, seed in [(cell, seeds[0]) for cell in (*corners, *cells)] + [(corners[0], seed) for seed in seeds]:
        recipe, invalid = resolve(raw, [*axes.overrides(cell), f"{SEED}={seed}", "control=false"])
        problems += invalid
        if recipe is not None and len(samples) < len(corners):
            samples.append(recipe)
    if len({sample.label_free for sample in samples}) > 1:
        problems.append(
            Problem(("keys",), "some trials learn from labels and some do not, which are ranked by other metrics")
        )
    if problems:
        raise InputError(listed(problems, source, "sweep"))
    return Sweep(options, others, seeds, raw, resolved, tuple(samples), source, plugins)


def _options(given: Mapping[Any, Any]) -> tuple[SweepFile | None, list[Problem]]:
    plain = {str(key): value for key, value in given.items()}
    if isinstance(plain.get("stop"), str):
        plain["stop"] = {"method": plain["stop"]}
    try:
        return SweepFile.model_validate(plain), []
    except ValidationError as error:
        return None, [_problem(item) for item in error.errors(include_url=False)]


def _problem(item: Any) -> Problem:
    path = tuple(item["loc"])
    if item["type"] == "extra_forbidden":
        section: type[Section] = Hyperband if path[0] == "stop" else SweepFile
        near = difflib.get_close_matches(str(path[-1]), section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(section.model_fields)}"
        return Problem(path, f"unknown key; {known}")
    return Problem(path, "missing" if item["type"] == "missing" else plain_message(item))


def _seeds(varied: Sequence[Axis]) -> tuple[tuple[int, ...], list[Problem]]:
    found = next((one for one in varied if one.key == SEED), None)
    if found is None:
        return (), []
    values = found if isinstance(found, Values) else axes.listed_values(found)
    if isinstance(values, Problem):
        return (), [values]
    return tuple(values.values), []


def _numbers(options: SweepFile, varied: Sequence[Axis], seeds: Sequence[int], max_trials: int) -> Iterator[Problem]:
    count = len(seeds) or 1
    if options.search == "grid":
        total = axes.size([one for one in varied if isinstance(one, Values)]) * count
        if options.trials is not None:
            yield Problem(
                ("trials",), "a grid has one for each combination; leave the key out, or search by random or tpe"
            )
    elif options.trials is None:
        yield Problem(("trials",), f"missing; {options.search} needs a number of runs")
        return
    else:
        total = options.trials
        if total % count:
            yield Problem(("trials",), f"each configuration has {count} seeds; give a multiple of that, got {total}")
        if not varied:
            yield Problem(("keys",), f"{options.search} needs a key to vary besides the seed")
    if total > max_trials:
        yield Problem(
            ("keys",), f"{total:,} trials, more than --max-trials {max_trials}; give fewer values, or a larger limit"
        )


def _base(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Recipe]:
    """The base recipe with what it names as its own base, and overrides, as plain data; and resolved."""
    recipe = load(path, overrides)
    raw, _ = with_bases(read_mapping(path), path, path.parent)
    merged, _ = overridden(raw, overrides)
    return {**merged, "name": recipe.name}, recipe


def _problems_of_values(raw: Mapping[str, Any], varied: Sequence[Axis]) -> Iterator[Problem]:
    """Of single values, each beside the base alone: keys that do not exist."""
    for one in varied:
        first = one.values[0] if isinstance(one, Values) else one.low
        for problem in resolve(raw, [*axes.overrides({one.key: first}), "control=false"])[1]:
            if ".".join(map(str, problem.path)).startswith(one.key):
                yield problem


def _problems_of_recipe(resolved: Recipe, varied: Sequence[Axis]) -> Iterator[Problem]:
    keys = {one.key for one in varied}
    if resolved.data.select_on == "test" or "data.select_on" in keys:
        yield Problem(("data", "select_on"), "a sweep ranks on validation; the test images are for the chosen trial")
    if resolved.train.max_minutes is not None:
        yield Problem(
            ("train", "max_minutes"), "would end every trial before its recipe does; give train.epochs, or `minutes`"
        )
    if "train.select" in keys:
        yield Problem(("train", "select"), "trials are ranked by it, so all need the same; set it in the base")


def _corners(varied: Sequence[Axis]) -> list[dict[str, Any]]:
    """Configurations that have each value, and each end of a range, once at least."""
    ends = [list(one.values) if isinstance(one, Values) else [one.low, one.high] for one in varied]
    most = max(map(len, ends), default=1)
    return [
        {one.key: values[index % len(values)] for one, values in zip(varied, ends, strict=True)}
        for index in range(most)
    ]
