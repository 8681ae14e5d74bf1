"""Reads YAML files as plain data, with limits on size and depth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from distill.errors import InputError

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000
"""Of a YAML text with aliases expanded: a few lines of them can expand beyond any memory."""
MAX_DEPTH = 50
_SHOWN = 120
"""Characters of a wrong value in a message."""


def short(value: object) -> str:
    """A key, path or value for a message: printable, in one line of bounded length."""
    text = value if isinstance(value, str) else str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_mapping(path: Path) -> dict[Any, Any]:
    """The YAML file at `path` as a mapping; empty for an empty file.

    Raises:
        InputError: the file cannot be read, is too long or no YAML mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path}: cannot read the recipe: {reason}. Give the path of a YAML file.") from None
    return mapping_of(content, str(path))


def mapping_of(content: bytes, source: str) -> dict[Any, Any]:
    """The recipe in a YAML text as a mapping; empty for an empty text.

    Raises:
        InputError: it is too long, not UTF-8 or no YAML mapping; the message begins with `source`.
    """
    try:
        text = content[: 4 * MOST_CHARACTERS].decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: cannot read the recipe: {error}. Give the path of a YAML file.") from None
    if len(text) > MOST_CHARACTERS or len(content) > 4 * MOST_CHARACTERS:
        raise InputError(f"{source}: longer than {MOST_CHARACTERS:,} characters: no recipe. Give the path of one.")
    raw = read_yaml(text, source=source)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a recipe is a mapping of keys to values, not a {type(raw).__name__}.")
    return raw


def read_yaml(text: str, *, source: str) -> Any:
    """YAML as plain data: no object tags, no duplicate keys, `1e-3` is a number as in YAML 1.2.

    Raises:
        InputError: it is no YAML, nested too deeply, or more than `MOST_VALUES` values.
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # besides YAMLError, Python's constructors fail on `2024-13-45` or 5,000 digits
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or short(" ".join(str(error).split()))
        raise InputError(f"{source}: not valid YAML{where}: {reason}") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Values under each complete node, aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Check the limits before objects are built: merging `<<` copies what aliases refer to."""
        event: Any = self.peek_event()
        mark, before = event.start_mark, self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        assert node is not None, "only a whole document can be missing"
        if isinstance(event, yaml.AliasEvent) and node not in self._sizes:
            problem = "an alias refers to a section that contains it; write it out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self._values += self._sizes.get(node, 1)
        if self._values > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, aliases expanded")
        self._sizes[node] = self._values - before
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key '{short(key.value)}'", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
