"""The recipes that come with this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.errors import InputError
from distill.files.text import write_text
from distill.recipe.reading import read_mapping

HERE = Path(__file__).resolve().parent
FOLDER = next(folder for folder in (HERE / "recipes", HERE.parent / "recipes") if folder.is_dir())
"""In an installed package, else in a checkout."""
LAUNCHING = "accelerate"
"""The folder of configurations of `accelerate launch`, which are no recipes."""
LAUNCHED_BY = FOLDER / LAUNCHING / "one_process.yaml"


def shipped_recipes() -> dict[str, str]:
    """Name -> what it is, by the first line of its file."""
    paths = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != LAUNCHING]
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        .partition("\n")[0]
        .removeprefix("# ")
        for path in paths
    }


def table(recipes: dict[str, str]) -> Table:
    """Names and what they are."""
    columns = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, what in recipes.items():
        columns.add_row(name, what)
    return columns


def copy_recipe(name: str, to: Path) -> list[Path]:
    """Copy a recipe, those that it names and the launch file of one process to `to`/recipes, where their commands find
    them; returns their paths.

    Raises:
        InputError: there is no such recipe, or another file is in the way; nothing is written then.
    """
    known = name.removesuffix(".yaml")
    if known not in shipped_recipes():
        raise InputError(f"recipes: '{name}' is none of them. `distill recipes` lists them.")
    path = FOLDER / f"{known}.yaml"
    found = {path, *_named(path), LAUNCHED_BY}
    copies = {to / "recipes" / source.relative_to(FOLDER): source.read_text(encoding="utf-8") for source in found}
    for copy, text in copies.items():
        if os.path.lexists(copy) and not (copy.is_file() and copy.read_text(encoding="utf-8") == text):
            raise InputError(f"{copy}: is there already, and not the recipe '{known}'. Move it away, or use it.")
    for copy, text in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_text(copy, text)
    return sorted(copies, key=lambda copy: (copy != to / "recipes" / path.relative_to(FOLDER), copy))


def _named(path: Path) -> Iterator[Path]:
    """The recipes that a recipe names: its base, and those that train its teacher and its initial weights."""
    raw: dict[str, Any] = read_mapping(path)
    if "base" in raw:
        yield from _with_named(path.parent / raw["base"])
    teachers = raw.get("teacher") or []
    for section in (*(teachers if isinstance(teachers, list) else [teachers]), raw.get("pretrain") or {}):
        if "recipe" in section:
            yield from _with_named(FOLDER.parent / section["recipe"])


def _with_named(path: Path) -> Iterator[Path]:
    path = FOLDER / path.resolve().relative_to(FOLDER.resolve())
    yield path
    yield from _named(path)
