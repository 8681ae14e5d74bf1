"""From a YAML file and `key=value` overrides to one validated recipe, or to all its problems at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from distill.errors import InputError
from distill.recipe.combinations import impossible_combinations
from distill.recipe.objectives import OnLogits
from distill.recipe.schema import Recipe

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000
"""Of a YAML file with its aliases written out: a few lines of them can stand for more than any memory holds."""
DEEPEST = 50
MOST_PROBLEMS = 40
_SHOWN = 120
"""Characters of a wrong value in a message."""


class Problem(NamedTuple):
    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(_short(part) for part in self.path) or 'recipe'}: {self.message}"


def _short(value: object) -> str:
    """A key, or a value that is shown, in one line of bearable length."""
    text = value if isinstance(value, str) else str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate and resolve the recipe at `path`.

    Raises:
        InputError: the file is missing or no YAML mapping, or the recipe has problems: all of them are listed.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # a path or a text with characters that there cannot be among others
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path}: cannot read the recipe: {reason}. Give the path of a YAML file.") from None
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{path}: longer than {MOST_CHARACTERS:,} characters: no recipe. Give the path of one.")
    raw = read_yaml(text, source=str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}.")
    return from_mapping(raw, overrides, source=str(path), default_name=_name_from(path))


def load_teachers_recipe(target: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path that ends in .yaml or .yml, or one of which only the teacher's name is given; see `load`."""
    if Path(target).suffix in {".yaml", ".yml"}:
        return load(target, overrides)
    return from_mapping({"teacher": {"model": target}}, overrides, source=target)


def from_mapping(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe", default_name: str = "run"
) -> Recipe:
    """Validate a recipe given as plain data; see `load`."""
    data = {str(key): _plain(value, f"{source}: {_short(str(key))}") for key, value in raw.items()}
    problems = [problem for text in overrides if (problem := _override(data, text))]
    recipe, invalid = _validate(data)
    problems += invalid
    if recipe is None:
        # Combinations are checked even where single values are wrong, on the recipe without the wrong values.
        recipe, _ = _validate(_without(data, [problem.path for problem in invalid]))
    if recipe is not None:
        broken = {problem.path for problem in invalid}
        problems += [
            Problem(check.keys[0], check.message)
            for check in impossible_combinations(recipe)
            if not any(key[: len(path)] == path for key in check.keys for path in broken)
        ]
    if problems or recipe is None:
        distinct = list(dict.fromkeys(problems))
        lines = [f"\n  {problem}" for problem in distinct[:MOST_PROBLEMS]]
        if len(distinct) > MOST_PROBLEMS:
            lines.append(f"\n  and {len(distinct) - MOST_PROBLEMS} more")
        raise InputError(f"{source}: {len(distinct)} problem(s) in the recipe:{''.join(lines)}")
    label_weight = recipe.label_weight
    if label_weight is None:
        label_weight = 0.5 if any(isinstance(objective, OnLogits) for objective in recipe.distill) else 1.0
    return recipe.replace(name=recipe.name or default_name, label_weight=label_weight)


def _plain(value: Any, where: str) -> Any:
    """A deep copy of YAML data in which every key is a string."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be written out as plain data ({error}).") from None


def read_yaml(text: str, *, source: str) -> Any:
    """YAML as plain data: no tags that build objects, no key twice, `1e-3` a number as in YAML 1.2.

    Raises:
        InputError: it is no YAML, or its aliases or its depth come to more than any recipe needs.
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # besides YAMLError, whatever Python's constructors say of `2024-13-45` or 5,000 digits
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or _short(" ".join(str(error).split()))
        raise InputError(f"{source}: not valid YAML{where}: {reason}") from None


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        """Also checks the size, before anything is built: merging `<<` copies what aliases only point to."""
        node = super().get_single_node()
        if node is not None and self._size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"aliases repeat others until there are more than {MOST_VALUES:,} values")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {DEEPEST} deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _size(self, node: yaml.Node, known: dict[int, int | None], path: str = "") -> int:
        """Values under the node at a path, aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in known:
            known[id(node)] = None
            total = 1
            for child in node.value:
                key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
                total += self._size(value, known, f"{path}.{_short(str(key.value))}" if key else path)
                total += self._size(key, known, path) if key else 0
            known[id(node)] = total
        size = known[id(node)]
        if size is None:
            problem = f"{path.strip('.')}: an alias refers to the section it stands in; write it out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{_short(key.value)}' stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:100] or "run"


def _override(data: dict[str, Any], text: str) -> Problem | None:
    """Set one `dotted.key=value` in `data`; sections that are absent or null come into being."""
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
        return Recipe.model_validate(data), []
    except ValidationError as error:
        messages: dict[tuple[str | int, ...], list[str]] = {}
        for item in error.errors(include_url=False):
            for path, text in _problems_in(item, _path_in(data, item["loc"])):
                messages.setdefault(path, []).append(text)
        # A value that fits no branch of a union is reported once, with what each branch wants.
        return None, [Problem(path, " or ".join(dict.fromkeys(texts))) for path, texts in messages.items()]


def _path_in(data: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Pydantic's location less the union tags in it, which are no keys of the recipe."""
    path: list[str | int] = []
    node = data
    for part in location:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(part)
            node = node[part]  # type: ignore[index]
    return tuple(path)


def _problems_in(item: Any, path: tuple[str | int, ...]) -> list[Problem]:
    """What one of pydantic's errors means in the words of the recipe."""
    value, kind = item["input"], item["type"]
    if kind == "extra_forbidden":
        return [Problem(path, f"unknown key{_suggest(path)}")]
    if kind.startswith("union_tag") and isinstance(value, dict):
        choice = item["ctx"]["discriminator"].strip("'")
        if choice in value:
            return [
                Problem(
                    (*path, choice),
                    f"should be one of {item['ctx']['expected_tags']}, got {_short(repr(value[choice]))}",
                )
            ]
        known = _keys_under(path)
        unknown = [Problem((*path, key), f"unknown key{_suggest((*path, key))}") for key in value if key not in known]
        return [Problem(path, f"the key '{choice}' is missing; it says which one this is"), *unknown]
    shown = "" if isinstance(value, dict | list) else f", got {_short(repr(value))}"
    text = re.sub(r"^(Input|Value error,) should", "should", item["msg"])
    return [Problem(path, f"{text[0].lower()}{text[1:]}{shown}")]


def _suggest(path: tuple[str | int, ...]) -> str:
    wrong = str(path[-1])
    siblings = _keys_under(path[:-1])
    if near := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.5):
        return f"; did you mean '{near[0]}'?"
    elsewhere = [".".join(known) for known in _known_keys() if known[-1] == wrong]
    if elsewhere:
        return f"; it belongs at '{elsewhere[0]}'"
    return f"; known here: {', '.join(dict.fromkeys(siblings))}" if siblings else ""


def _keys_under(path: tuple[str | int, ...]) -> list[str]:
    plain = tuple(part for part in path if isinstance(part, str))
    return [known[-1] for known in _known_keys() if known[:-1] == plain]


@cache
def _known_keys() -> list[tuple[str, ...]]:
    schema = Recipe.model_json_schema()
    found: list[tuple[str, ...]] = []

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ()), *([node["items"]] if "items" in node else ())):
            walk(branch, path)
        for key, child in node.get("properties", {}).items():
            found.append((*path, key))
            walk(child, (*path, key))

    walk(schema, ())
    return found


def _without(data: Any, paths: list[tuple[str | int, ...]]) -> Any:
    """A deep copy of `data` in which nothing stands at any of `paths`."""
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
