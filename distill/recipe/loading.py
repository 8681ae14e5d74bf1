"""Loads a recipe from YAML and `key=value` overrides, and reports all its problems at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from distill import options
from distill.errors import InputError
from distill.recipe.combinations import impossible_combinations
from distill.recipe.inheritance import with_bases
from distill.recipe.keys import recipe_keys
from distill.recipe.reading import read_mapping, read_yaml, short
from distill.recipe.schema import Recipe
from distill.recipe.variants import UNKNOWN_SOURCE, recipe_model

MOST_PROBLEMS = 40
KEY_OF_SECTION = {
    "teacher": "model", "student": "model", "data": "name", "optim": "name", "attention": "kind", "distill": "method",
    "init": "kind",
}  # fmt: skip
"""The key that a single word in place of a section probably means."""


class Problem(NamedTuple):
    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(short(part) for part in self.path) or 'recipe'}: {self.message}"

    @classmethod
    def of(cls, combination: options.Problem) -> Problem:
        """A problem of values that do not fit together, under the first of their keys."""
        return cls(combination.keys[0], combination.message)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge with `base`, override, validate and resolve the recipe at `path`.

    Raises:
        InputError: the file or its base is missing or no YAML mapping, or lists all problems of the recipe.
    """
    path = Path(path)
    given = read_mapping(path)
    if not given and not overrides:
        raise InputError(f"{path}: the recipe is empty. `distill recipes` lists some to begin with.")
    raw, bases = with_bases(given, path, path.parent)
    source = f"{path} (base: {', '.join(map(short, bases))})" if bases else str(path)
    return from_mapping(raw, overrides, source=source, default_name=_name_from(path))


def load_teachers_recipe(target: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path that ends in .yaml or .yml, or a recipe with the teacher of this name; see `load`."""
    if Path(target).suffix in {".yaml", ".yml"}:
        return load(target, overrides)
    return from_mapping({"teacher": {"model": target}}, overrides, source=target)


def from_mapping(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe", default_name: str = "run"
) -> Recipe:
    """Validate a recipe given as plain data, whose `base` is relative to the working directory; see `load`."""
    recipe, problems = resolve(raw, overrides, source=source, default_name=default_name)
    if recipe is None:
        raise InputError(listed(problems, source))
    return recipe


def resolve(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe", default_name: str = "run"
) -> tuple[Recipe | None, list[Problem]]:
    """The resolved recipe, or None and its problems; see `from_mapping`."""
    raw, _ = with_bases(raw, Path(source), Path())
    data, problems = overridden(raw, overrides, source=source)
    if "base" in data:
        problems.append(Problem(("base",), "cannot be overridden; name the base in the recipe itself"))
    recipe, invalid = _validate(data)
    problems += invalid
    if recipe is None:
        # Check combinations also if single values are wrong, on the recipe without these.
        recipe, _ = _validate(_without(data, [problem.path for problem in invalid]))
    if recipe is not None:
        broken = {problem.path for problem in invalid}
        problems += [
            Problem.of(check)
            for check in impossible_combinations(recipe)
            if not any(key[: len(path)] == path for key in check.keys for path in broken)
        ]
    if problems or recipe is None:
        return None, problems
    label_weight = recipe.label_weight
    if label_weight is None:
        label_weight = 0.5 if any(objective.needs.logits for objective in recipe.distill) else 1.0
    recipe = recipe.replace(name=recipe.name or default_name, label_weight=label_weight)
    return recipe.replace(evaluation=recipe.evaluation.resolved(label_free=recipe.label_free)), []


def overridden(
    raw: Mapping[str, Any], overrides: Sequence[str], *, source: str = "recipe"
) -> tuple[dict[str, Any], list[Problem]]:
    """A copy of plain data with `key=value` overrides, and what is wrong with these."""
    data = {str(key): _plain(value, f"{source}: {short(str(key))}") for key, value in raw.items()}
    return data, [problem for text in overrides if (problem := _override(data, text))]


def listed(problems: Sequence[Problem], source: str, what: str = "recipe") -> str:
    """The message of all problems of a recipe."""
    distinct = list(dict.fromkeys(problems))
    lines = [f"\n  {problem}" for problem in distinct[:MOST_PROBLEMS]]
    if len(distinct) > MOST_PROBLEMS:
        lines.append(f"\n  and {len(distinct) - MOST_PROBLEMS} more")
    return f"{source}: {len(distinct)} problem(s) in the {what}:{''.join(lines)}"


def known_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain data without what is unknown or invalid here: of another version, or damaged."""
    data: Any = {str(key): _plain(value, short(str(key))) for key, value in raw.items()}
    for _ in range(MOST_PROBLEMS):
        recipe, invalid = _validate(data)
        if recipe is not None:
            return dict(data)
        data = _without(data, [problem.path for problem in invalid])
    return {}


def _plain(value: Any, where: str) -> Any:
    """A deep copy of YAML data in which every key is a string."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not plain data ({error}).") from None


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:100] or "run"


def _override(data: dict[str, Any], text: str) -> Problem | None:
    """Set one `dotted.key=value` in `data`; creates sections that are missing or null."""
    key, equals, value_text = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        return Problem((text,), "an override has the form key=value, such as train.epochs=10")
    try:
        value = read_yaml(value_text, source=key)
    except InputError as error:
        return Problem(tuple(path), str(error).removeprefix(f"{key}: "))
    node: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return Problem(
                    tuple(path), f"'{'.'.join(path[:depth])}' is a list of {len(node)}; give an index below that"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            return Problem(tuple(path), f"'{'.'.join(path[:depth])}' is a single value and has no keys")
        if last:
            node[index] = value
        else:
            node = node[index]
    return None


def _validate(data: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    try:
        return recipe_model(data).model_validate(data), []
    except ValidationError as error:
        messages: dict[tuple[str | int, ...], list[str]] = {}
        for item in error.errors(include_url=False):
            for path, text in _problems_in(item, _path_in(data, item["loc"])):
                messages.setdefault(path, []).append(text)
        # A value that fits no branch of a union is reported once, with what each branch wants.
        return None, [Problem(path, " or ".join(dict.fromkeys(texts))) for path, texts in messages.items()]


def _path_in(data: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Pydantic's location without union tags, which are no keys of the recipe."""
    path: list[str | int] = []
    node = data
    for part in location:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(part)
            node = node[part]  # type: ignore[index]
    return tuple(path)


def _problems_in(item: Any, path: tuple[str | int, ...]) -> list[Problem]:
    """One of pydantic's errors in terms of the recipe."""
    value, kind = item["input"], item["type"]
    if kind == "extra_forbidden":
        return [Problem(path, f"unknown key{_suggest(path)}")]
    if kind.startswith("union_tag") and isinstance(value, dict):
        choice = item["ctx"]["discriminator"].strip("'")
        if choice in value:
            return [
                Problem(
                    (*path, choice),
                    f"should be one of {item['ctx']['expected_tags']}, got {short(repr(value[choice]))}"
                    f"{_nearest(value[choice], item['ctx']['expected_tags'])}; a plugin's variant needs --plugin",
                )
            ]
        known = _keys_under(path)
        unknown = [Problem((*path, key), f"unknown key{_suggest((*path, key))}") for key in value if key not in known]
        return [Problem(path, f"the key '{choice}' is missing; it selects the variant"), *unknown]
    if kind == UNKNOWN_SOURCE:
        return [Problem((*path, "source"), f"{item['msg']}; got {short(repr(value['source']))}")]
    section = next((part for part in reversed(path) if isinstance(part, str)), "")
    if isinstance(value, str) and (key := KEY_OF_SECTION.get(section)):
        what, given = "a section of keys", f"{{{key}: {short(value)}}}"
        if kind == "list_type":
            what, given = "a list of sections", f"[{given}]"
        return [Problem(path, f"should be {what}, such as {given}, got {short(repr(value))}")]
    if kind == "string_pattern_mismatch":
        instead = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-") or "run"
        allowed = "should have letters, digits, '.', '_' and '-' alone"
        return [Problem(path, f"{allowed}, such as '{short(instead)}', got {short(repr(value))}")]
    return [Problem(path, plain_message(item))]


def plain_message(item: Any) -> str:
    """What one of pydantic's errors says, in the words of this project."""
    value = item["input"]
    shown = "" if isinstance(value, dict | list) else f", got {short(repr(value))}"
    text = re.sub(r"^(Input|Value error,) should", "should", item["msg"])
    text = re.sub(r"a valid dictionary( or .*)?$", "a section of keys", text)
    return f"{text[0].lower()}{text[1:]}{shown}"


def _nearest(wrong: Any, expected: str) -> str:
    near = difflib.get_close_matches(str(wrong), re.findall(r"'([^']*)'", expected), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _suggest(path: tuple[str | int, ...]) -> str:
    wrong = str(path[-1])
    siblings = _keys_under(path[:-1])
    elsewhere = [".".join(known) for known in _known_keys() if known[-1] == wrong]
    if (parent := ".".join(part for part in path[:-1] if isinstance(part, str))) and f"{parent}.{wrong}" in elsewhere:
        return f"; other variants of '{parent}' have it, the chosen one has not"
    if elsewhere:
        return f"; it belongs at '{elsewhere[0]}'"
    if near := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.5):
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(dict.fromkeys(siblings))}" if siblings else ""


def _keys_under(path: tuple[str | int, ...]) -> list[str]:
    plain = tuple(part for part in path if isinstance(part, str))
    return [known[-1] for known in _known_keys() if known[:-1] == plain]


@cache
def _known_keys() -> list[tuple[str, ...]]:
    """Without the places of items in lists."""
    return [tuple(part for part in key.path if part != "0") for key in recipe_keys()]


def _without(data: Any, paths: list[tuple[str | int, ...]]) -> Any:
    """A deep copy of `data` without the values at `paths`."""
    if isinstance(data, dict):
        return {
            key: _without(value, [path[1:] for path in paths if path[:1] == (key,)])
            for key, value in data.items()
            if (key,) not in paths
        }
    if isinstance(data, list):
        return [
            _without(value, [path[1:] for path in paths if path[:1] == (index,)])
            for index, value in enumerate(data)
            if (index,) not in paths
        ]
    return data
