"""What a sweep varies: values or a range for each key of the recipe."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from distill.recipe.loading import Problem

SEED = "seed"
RANGE = ("low", "high", "log", "step")
RESERVED = ("name", "control", "train.test", "train.max_minutes", "base")
"""Keys that a sweep sets itself, or that would end a trial before its recipe does."""
MOST_VALUES = 10_000
"""Of one key."""
LONGEST_NAME = 60


@dataclass(frozen=True)
class Values:
    """A list of alternatives: numbers, words, null, or whole sections and lists."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: integers if both are."""

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Axis = Values | Range


def axis(key: str, given: Any) -> Axis | Problem:
    """The alternatives of one key, or what is wrong with them."""
    if key in RESERVED or key.partition(".")[0] == "base":
        return Problem((key,), "is set by the sweep itself and cannot be varied")
    if isinstance(given, list):
        if not given:
            return Problem((key,), "an empty list; give the values to try")
        if len({text_of(value) for value in given}) < len(given):
            return Problem((key,), f"a value is given twice: {text_of(given)}")
        return Values(key, tuple(given))
    if isinstance(given, Mapping) and {"low", "high"} <= given.keys():
        return _range(key, given)
    return Problem((key,), "should be a list of values, or a range such as {low: 1.0e-4, high: 1.0e-2, log: true}")


def _range(key: str, given: Mapping[Any, Any]) -> Axis | Problem:
    if unknown := sorted(str(name) for name in given if name not in RANGE):
        return Problem((key, unknown[0]), f"unknown key of a range; known here: {', '.join(RANGE)}")
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    for name, value in (("low", low), ("high", high), ("step", step)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not (name == "step" and value is None):
            return Problem((key, name), f"should be a number, got {value!r}")
    if not isinstance(log, bool):
        return Problem((key, "log"), f"should be true or false, got {log!r}")
    if not low < high:
        return Problem((key,), f"an empty range, from {low} to {high}; `low` should be below `high`")
    if log and (low <= 0 or step is not None):
        return Problem((key,), "`log` needs a `low` above 0, and no `step`")
    if step is not None and not 0 < step <= high - low:
        return Problem((key, "step"), f"should be above 0 and at most {high - low:g}, got {step}")
    found = Range(key, low, high, log, step)
    if found.whole and not isinstance(step, int | None):
        return Problem((key, "step"), f"should be an integer, as `low` and `high` are, got {step}")
    return found


def listed_values(found: Axis) -> Values | Problem:
    """The values of a grid's axis; a range has some if it has a step, or is one of integers."""
    if isinstance(found, Values):
        return found
    if found.log or (found.step is None and not found.whole):
        return Problem((found.key,), "a grid needs values: give a list, or a `step`; random and tpe take a range")
    step = found.step or 1
    count = math.floor((found.high - found.low) / step + 1e-9) + 1
    if count > MOST_VALUES:
        return Problem((found.key,), f"{count:,} values; give fewer")
    return Values(found.key, tuple(found.low + index * step for index in range(count)))


def grid(axes: Sequence[Values]) -> list[dict[str, Any]]:
    """All combinations, the last key fastest; one empty combination without keys."""
    keys = [found.key for found in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(found.values for found in axes))]


def size(axes: Sequence[Values]) -> int:
    return math.prod(len(found.values) for found in axes)


def text_of(value: Any) -> str:
    """A value as YAML in one line, as in an override; it reads back as the same value."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False).removesuffix("\n...\n").strip()
    )


def overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={text_of(value)}" for key, value in values.items()]


def label(value: Any) -> str:
    """A value in words: methods by their names, a section by the values in it."""
    if isinstance(value, list):
        return " + ".join(map(label, value)) or "none"
    if isinstance(value, Mapping):
        named = next((value[name] for name in ("method", "kind", "model", "recipe", "name") if name in value), None)
        return str(named) if named is not None else text_of(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def labels(values: Mapping[str, Any], axes: Sequence[Axis]) -> dict[str, str]:
    """Of each key, its value in a table or chart: the label, or the value itself where another one has that label."""
    found = {key: label(value) for key, value in values.items()}
    for one in axes:
        if isinstance(one, Values) and [label(value) for value in one.values].count(found.get(one.key, "")) > 1:
            found[one.key] = text_of(values[one.key])
    return found


def name_of(number: int, values: Mapping[str, Any]) -> str:
    """The name of a trial's folder: its number, keys and values."""
    words = [f"{key.rpartition('.')[2]}-{label(value)}" for key, value in values.items()]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-.")[:LONGEST_NAME].strip("-.")
    return f"{number:03d}-{name or 'run'}"
