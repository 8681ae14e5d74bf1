"""`base: other.yaml`: a recipe that changes another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.recipe.reading import read_mapping, short

KEY = "base"
VARIANTS = ("kind", "source")
"""Keys that select the variant of a section, and thereby its other keys; null: none."""
MOST_BASES = 10
_LONGEST_PATH = 1000


def with_bases(raw: Mapping[Any, Any], path: Path, folder: Path) -> tuple[Mapping[Any, Any], list[Path]]:
    """Merge the recipe `raw` over its chain of bases; returns it and the files of the bases.

    Args:
        raw: a recipe as plain data; the result has no key `base`.
        path: of the recipe, for messages.
        folder: that `base` is relative to. The base of a base is relative to the file that names it.

    Raises:
        InputError: a base cannot be read, is its own base, or there are more than `MOST_BASES` of them.
    """
    layers, files = [raw], [path]
    while (base := layers[-1].get(KEY)) is not None:
        if not (isinstance(base, str) and base.isprintable() and 0 < len(base) <= _LONGEST_PATH):
            raise InputError(f"{files[-1]}: base: should be the path of a recipe, got {short(repr(base))}")
        files.append(folder / base)
        chain = " -> ".join(map(str, files))
        if os.path.realpath(files[-1]) in map(os.path.realpath, files[:-1]):
            raise InputError(f"{chain}: base: a recipe cannot be its own base")
        if len(files) > MOST_BASES + 1:
            raise InputError(f"{chain}: base: more than {MOST_BASES} bases; merge some of them into one file")
        try:
            layers.append(read_mapping(files[-1]))
        except InputError as error:
            raise InputError(
                f"{files[-2]}: base: {error} A run directory has the recipe without its base as resolved.yaml."
            ) from None
        folder = files[-1].parent
    own = ({key: value for key, value in layer.items() if key != KEY} for layer in reversed(layers))
    return reduce(_merged, own), files[1:]


def _merged(base: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge mappings key by key; other values, lists, null and sections of another variant are replaced."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            same = all(value.get(name, before.get(name)) == before.get(name) for name in VARIANTS)
            value = _merged(before, value) if same else _without_null_variant(value)
        result[key] = value
    return result


def _without_null_variant(section: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return {key: value for key, value in section.items() if key not in VARIANTS or value is not None}
