"""Who may import whom: the arrows of the rooms, kept by walking the imports of every file."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Import(NamedTuple):
    module: str
    """As far as it is a module of this project; of others the name as it stands."""
    when_loading: bool
    """False for imports within functions."""


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, for all of distill and teachers."""
    found = {}
    for path in sorted([*(ROOT / "distill").rglob("*.py"), *(ROOT / "teachers").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = source_files()


def imports_of(source: str, known: set[str]) -> set[Import]:
    """Every import but those for type checkers; `from a import b` is of `a.b` where that is a module, else of `a`."""
    return set(_imports(ast.parse(source).body, known, when_loading=True))


def _imports(nodes: Iterable[ast.AST], known: set[str], *, when_loading: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, when_loading) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if name in known else base, when_loading)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(node.orelse, known, when_loading=when_loading)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(ast.iter_child_nodes(node), known, when_loading=when_loading and not is_function)


IMPORTS = {name: imports_of(path.read_text(encoding="utf-8"), set(MODULES)) for name, path in MODULES.items()}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def room_of(module: str) -> str:
    """distill.data.folder -> distill.data; teachers.zoo -> teachers."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "distill" else parts[0]


def imported_by(*packages: str) -> set[tuple[str, str]]:
    """(module, what it imports) of all modules within `packages`; the standard library aside."""
    return {
        (name, found.module)
        for name, imports in IMPORTS.items()
        if within(name, *packages)
        for found in imports
        if found.module.split(".")[0] not in sys.stdlib_module_names
    }


@pytest.mark.parametrize("package", ["distill.methods", "distill.students.attention"])
def test_variants_import_torch_and_one_another_only(package: str) -> None:
    assert any(within(name, package) for name in MODULES)
    assert {pair for pair in imported_by(package) if not within(pair[1], "torch", "distill.features", package)} == set()


FORBIDDEN = {
    "distill.recipe": ("torch", "torchvision", "timm", "accelerate", "numpy", "teachers", "distill.inputs"),
    "distill.report": (
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "teachers",
        "distill.students",
        "distill.exports.folder",
        "distill.evaluation",
        "distill.checkpoint",
        "distill.data",
        "distill.inputs",
    ),
    "distill.data": ("timm.models", "teachers", "distill.students", "distill.methods", "distill.report"),
    "distill.students": ("teachers", "distill.data", "distill.methods", "distill.report"),
    "distill.training.optim": ("teachers", "distill.data", "distill.methods", "distill.report"),
    "distill.checkpoint": ("teachers", "distill.data", "distill.students", "distill.methods", "distill.report"),
    "teachers": ("distill.data", "distill.methods", "distill.report", "distill.checkpoint"),
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_rooms_do_not_reach_where_they_must_not(package: str) -> None:
    assert any(within(name, package) for name in MODULES)
    assert {pair for pair in imported_by(package) if within(pair[1], *FORBIDDEN[package])} == set()


# What stands above the trainer: the commands, and what they run.
BENCH = {name for name in MODULES if within(name, "distill.bench")}
ENTRANCES = {"distill.train", "distill.cli", "distill.pipeline", "distill.dry_run", *BENCH}


def test_only_the_entrances_import_the_trainer() -> None:
    above = {name for name, module in imported_by("distill", "teachers") if within(module, "distill.trainer")}
    assert above
    assert above <= ENTRANCES


def test_nothing_but_the_entrances_imports_an_entrance() -> None:
    assert {name for name, module in imported_by("distill", "teachers") if module in ENTRANCES} <= ENTRANCES


def test_rooms_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        if name == "distill":
            continue
        rooms = {
            room_of(found.module)
            for found in imports
            if found.when_loading and found.module in MODULES and found.module != "distill"
        }
        graph.setdefault(room_of(name), set()).update(rooms - {room_of(name)})
    assert len(graph) > 5
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the rooms on the cycle


def test_the_package_itself_imports_no_room() -> None:
    """`import distill` comes before every other import of the project: what it imports, everything does."""
    assert {found.module for found in IMPORTS["distill"] if found.when_loading} <= {"__future__", "typing"}


def test_the_walk_finds_imports_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import torch.nn
from distill.data import folder, open_dataset
from . import relative
if TYPE_CHECKING:
    import timm
else:
    import scipy
try:
    import safetensors
except ImportError:
    pass
class A:
    import yaml
    def f(self):
        if True:
            from distill import trainer
"""
    known = {"distill.data", "distill.data.folder", "distill.trainer"}
    with pytest.raises(AssertionError, match="absolute"):
        imports_of(source, known)
    found = imports_of(source.replace("from . import relative", ""), known)
    assert found == {
        Import("typing", True),
        Import("torch.nn", True),
        Import("distill.data.folder", True),
        Import("distill.data", True),
        Import("scipy", True),
        Import("safetensors", True),
        Import("yaml", True),
        Import("distill.trainer", False),
    }
    assert room_of("distill.data.folder") == "distill.data"
    assert room_of("teachers.zoo") == "teachers"
    assert within("distill.data.folder", "distill.data")
    assert not within("distill.database", "distill.data")
