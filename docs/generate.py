"""The reference pages in Markdown, out of the code: the schema of recipes, the parsers of commands, the files of a
run and the names of the Python interface.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import distill
from distill import registry
from distill.cli import COMMANDS, main
from distill.files.contents import METRICS, RUN_FILES
from distill.files.records import Environment, Record, Status
from distill.options import StandardAttention
from distill.recipe import recipe_model
from distill.recipe.initialization import Impulse, Mimetic, Select

Node = Mapping[str, Any]
"""A part of a JSON schema."""
FUNCTIONS = ("init", "train", "Run", "evaluate", "compare", "export", "predict", "load_student", "load_teacher")
"""In the order in which they are used, with what `train` returns."""
TYPES = {"integer": "int", "number": "float", "boolean": "bool"}


def python() -> str:
    """A directive of mkdocstrings for each public name."""
    others = [name for name in distill.__all__ if name not in FUNCTIONS]
    return "\n\n".join(_directive(name) for name in [*FUNCTIONS, *others])


def _directive(name: str) -> str:
    found = getattr(distill, name)
    options = [f"heading: distill.{name}", f"toc_label: {name}"]
    if name != "Run":  # of other classes no member is public
        options.append("members: false")
    lines = [f"::: {found.__module__}.{found.__qualname__}", "    options:", *(f"      {option}" for option in options)]
    return "\n".join(lines)


def commands() -> str:
    """The help of every command, as a terminal of 80 columns has it."""
    return "\n\n".join(f"## distill {name}\n\n```text\n{_help(name)}\n```" for name in COMMANDS)


def _help(name: str) -> str:
    output, terminal = io.StringIO(), {"COLUMNS": "80", "NO_COLOR": "1"}
    with patch.dict(os.environ, terminal), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([name, "--help"])
    return output.getvalue().strip()


def run_files() -> str:
    """Tables of the files of a run, and of the keys of those that other programs may read."""
    parts = [
        "## Files",
        _table(["file", "content"], ([f"`{name}`", text] for name, text in RUN_FILES.items())),
        "## metrics.jsonl",
        _table(["key", "value"], ([f"`{name}`", text] for name, text in METRICS.items())),
        "## status.json",
        _record(Status),
        "## environment.json",
        _record(Environment),
    ]
    return "\n\n".join(parts)


def _record(model: type[Record]) -> str:
    rows = ([f"`{key}`", field.description or ""] for key, field in model.model_fields.items())
    return _table(["key", "value"], rows)


VARIANTS = {
    "student": ("students", "model"),
    "distill": ("methods", "method"),
    "student.attention": ("attention", "kind"),
}
"""Sections that have a choice of variants: the registry's group, and the key that names the variant."""


def recipe() -> str:
    """Tables of all keys by section, then those of each variant."""
    schema = recipe_model({}).model_json_schema()
    sections: dict[str, Node] = {}
    for path, node in _sections("", schema, schema["$defs"]):
        sections.setdefault(path, node["properties"])
    parts = []
    for path, properties in sections.items():
        if path not in (*VARIANTS, "student.init"):
            parts += [f"### {path or 'The recipe itself'}", _keys(properties)]
    for path, (group, key) in VARIANTS.items():
        standard = {"standard": StandardAttention} if group == "attention" else {}
        parts += _variants(path, key, standard | dict(registry.options_of(group)))
    parts += _variants("student.init", "kind", {"mimetic": Mimetic, "impulse": Impulse, "select": Select})
    return "\n\n".join(parts)


def _sections(path: str, node: Node, definitions: Node) -> Iterator[tuple[str, Node]]:
    """(dotted path, definition) of a section and of all below it; a path comes once for each of its variants."""
    yield path, node
    for name, value in node.get("properties", {}).items():
        for reference in _references(value):
            yield from _sections(f"{path}.{name}".lstrip("."), definitions[reference], definitions)


def _references(value: Node) -> Iterator[str]:
    """Names of the sections that a value may be, also in a list."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2]
    for inner in (*_alternatives(value), *([value["items"]] if "items" in value else ())):
        yield from _references(inner)


def _alternatives(value: Node) -> list[Node]:
    return [*value.get("anyOf", ()), *value.get("oneOf", ())]


def _variants(path: str, key: str, options: dict[str, Any]) -> Iterator[str]:
    """What the variants of a section have in common, and what each has beside it."""
    found = {name: one.model_json_schema()["properties"] for name, one in options.items()}
    first, *others = found.values()
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    common.pop(key, None)
    yield f"### {path}, by its {key}"
    if common:
        yield f"All have\n\n{_keys(common)}"
    for name, properties in found.items():
        models = getattr(options[name], "models", None)
        yield f"#### {name}" if models is None else f"#### family {name}"
        if models is None:
            yield f"`{key}: {name}`. {properties[key].get('description', '')}"
        else:
            yield f"`model`: {', '.join(f'`{model}`' for model in models) or 'any other of timm'}."
        own = {one: value for one, value in properties.items() if one not in {*common, key}}
        if own:
            yield _keys(own)


def _keys(properties: Node) -> str:
    rows = []
    for name, value in properties.items():
        mark = r"\*" if value.get("may_change") else ""
        default = "" if "default" not in value else f"`{json.dumps(value['default'])}`"
        if isinstance(value.get("default"), dict) and ("$ref" in value or "oneOf" in value) and name != "weight":
            default = "below"
        rows.append([f"`{name}`{mark}", _type(value), default, value.get("description", "")])
    return _table(["key", "type", "default", "meaning"], rows)


def _type(value: Node) -> str:
    """'float, 0 to 1', '`crop`, `squash` or `pad`', 'section or null', ..."""
    if "enum" in value or "const" in value:
        return _either([f"`{one}`" for one in value.get("enum", [value.get("const")])])
    if alternatives := _alternatives(value):
        return _either(dict.fromkeys(map(_type, alternatives)))
    if "$ref" in value:
        return "section"
    kind = value.get("type", "any")
    if kind == "array":
        return f"list of {_type(value['items'])}" if value.get("items") else "list"
    return " ".join(filter(None, [TYPES.get(kind, {"object": "mapping"}.get(kind, kind)), _range(value)]))


def _range(value: Node) -> str:
    """'0 to 1', 'above 0', 'from 1'."""
    low, above, high, below = (value.get(key) for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    told = [
        "" if above is None else f"above {above:g}",
        "" if low is None else f"from {low:g}",
        "" if high is None else f"to {high:g}",
        "" if below is None or below >= 2**31 else f"below {below:g}",
    ]
    return " ".join(filter(None, told))


def _either(values: Collection[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    cells = ([cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, [":---"] * len(header), *cells])


PAGES = {"recipe": recipe, "commands": commands, "python": python, "run files": run_files}
"""What stands for `<!-- generated: NAME -->` in a page."""
