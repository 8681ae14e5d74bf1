"""All keys of recipes, and the values that their types list. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from distill.recipe.variants import recipe_model


class RecipeKey(NamedTuple):
    path: tuple[str, ...]
    """'0' for an item of a list, whatever its place."""
    values: tuple[str, ...]
    """As YAML; empty where the type lists none."""
    is_value: bool
    """Whether it may be one value, and not only a section or a list."""


@cache
def recipe_keys() -> tuple[RecipeKey, ...]:
    """Those of all variants that are known, in the order of the schema."""
    schema = recipe_model({}).model_json_schema()
    found: dict[tuple[str, ...], RecipeKey] = {}

    def branches(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        yield node
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from branches(branch)

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        for branch in branches(node):
            if "items" in branch:
                walk(branch["items"], (*path, "0"))
            for name, child in branch.get("properties", {}).items():
                inner = (*path, name)
                values, is_value = _values([*branches(child)])
                if (known := found.get(inner)) is not None:
                    values, is_value = [*known.values, *values], known.is_value or is_value
                found[inner] = RecipeKey(inner, tuple(dict.fromkeys(values)), is_value)
                walk(child, inner)

    walk(schema, ())
    return tuple(found.values())


def _values(branches: list[dict[str, Any]]) -> tuple[list[str], bool]:
    listed: list[str] = []
    for branch in branches:
        listed += [str(value) for value in (*branch.get("enum", ()), *([branch["const"]] if "const" in branch else ()))]
        listed += ["true", "false"] * (branch.get("type") == "boolean")
    return listed, any(branch.get("type") not in (None, "object", "array", "null") for branch in branches)
