"""Registry of variants: built in, from entry points of installed packages, and from plugins.

A variant is an attention kind, a student, a distillation method, a teacher source or a dataset reader: one module that
holds its options, its checks and its code, and registers its class:

    @register("methods", "hard", Options)
    class Hard(Method): ...

Recipes name variants and load no code. A name refers to a file of this package, to an entry point of an installed
package (group `distill.methods`, ...), or to what a `--plugin` registered.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from distill.errors import InputError
from distill.options import Options

GROUPS = {
    "attention": "students/attention",
    "students": "students",
    "methods": "methods",
    "teachers": "teaching",
    "datasets": "data",
}
"""Group -> folder of its built-in variants, one per file with the variant's name."""
LIGHT = ("__future__", "collections", "typing", "pydantic", "distill.options", "distill.recipe")
"""What a variant's options may import: modules without torch."""
Implementation = TypeVar("Implementation", bound=type)


@dataclass(frozen=True)
class Variant:
    """A registered variant."""

    group: str
    name: str
    options: type[Options]
    implementation: Any
    origin: str
    """Its module, or the plugin file."""

    def describe(self) -> str:
        """Module and version, or file and hash; compared on resume."""
        if self.origin in _files:
            return f"{self.origin} sha256:{_files[self.origin].digest}"
        package = self.origin.partition(".")[0]
        try:
            return f"{self.origin} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return self.origin


@dataclass(frozen=True)
class _File:
    module: ModuleType
    digest: str


_registered: dict[tuple[str, str], Variant] = {}
_files: dict[str, _File] = {}
_plugins: dict[str, None] = {}


def register(group: str, name: str, options: type[Options]) -> Callable[[Implementation], Implementation]:
    """Class decorator that makes a class available to recipes as `name`, with these options.

    Raises:
        InputError: another module has registered that name.
        ValueError: there is no such group.
    """
    if group not in GROUPS:
        raise ValueError(f"groups of variants are {', '.join(GROUPS)}; got '{group}'")

    def add(implementation: Implementation) -> Implementation:
        module = implementation.__module__
        origin = next((path for path, file in _files.items() if file.module.__name__ == module), module)
        if (known := _registered.get((group, name))) is not None and known.origin != origin:
            raise InputError(f"{origin}: {group} '{name}' is already registered by {known.origin}. Rename one of them.")
        if name in builtin_names(group) and origin != _builtin_module(group, name):
            raise InputError(f"{origin}: {group} '{name}' is built in. Use another name.")
        _registered[group, name] = Variant(group, name, options, implementation, origin)
        return implementation

    return add


def find(group: str, name: str) -> Variant:
    """Import and return the variant of that name.

    Raises:
        InputError: it is neither installed nor loaded.
    """
    if (group, name) not in _registered:
        if name in builtin_names(group):
            importlib.import_module(_builtin_module(group, name))
        elif name in entry_points(group):
            _load_entry_point(group, name)
    if (group, name) not in _registered:
        known = ", ".join(names(group))
        raise InputError(
            f"{group} '{name}' is unknown; known are {known}. If a plugin has it, give --plugin MODULE|FILE.py."
        )
    return _registered[group, name]


def names(group: str) -> list[str]:
    """All names that a recipe can use, built-in ones first."""
    loaded = (name for of, name in _registered if of == group)
    return list(dict.fromkeys([*builtin_names(group), *loaded, *entry_points(group)]))


def options_of(group: str, names: Iterable[str] = ()) -> dict[str, type[Options]]:
    """Name -> options of built-in and loaded variants, and of those of `names` that installed packages have.

    Options of built-in variants are read without importing the variant and torch, and stay the same classes afterwards.
    """
    found = {name: _builtin_options(group, name) for name in builtin_names(group)}
    for name in names:
        if name not in found and name in entry_points(group):
            find(group, name)
    others = {name: known.options for (of, name), known in _registered.items() if of == group and name not in found}
    return found | others


def load_plugin(target: str) -> None:
    """Import a module or a Python file (`FILE.py`) that registers variants. A file is imported again only if it has
    changed.

    Raises:
        InputError: it is missing, fails to import, or registers a name that is taken.
    """
    if not target.endswith(".py"):
        _guarded(target, lambda: importlib.import_module(target))
        _plugins[target] = None
        return
    path = Path(target).resolve()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"--plugin {target}: cannot be read: {error.strerror}.") from None
    origin = str(path)
    if origin in _files and _files[origin].digest == digest:
        return
    for key in [key for key, variant in _registered.items() if variant.origin == origin]:
        del _registered[key]
    name = f"distill_plugin_{hashlib.sha256(origin.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--plugin {target}: is no Python file.")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module
    _files[origin] = _File(module, digest)
    try:
        _guarded(target, lambda: loader.exec_module(module))
    except InputError:
        del sys.modules[name], _files[origin]
        for key in [key for key, variant in _registered.items() if variant.origin == origin]:
            del _registered[key]
        raise
    _plugins[origin] = None


def _guarded(target: str, load: Callable[[], object]) -> None:
    try:
        load()
    except InputError as error:
        raise InputError(f"--plugin {error}") from None
    except Exception as error:  # plugin code may raise anything
        raise InputError(f"--plugin {target}: fails to import: {type(error).__name__}: {error}") from error


def _load_entry_point(group: str, name: str) -> None:
    point = entry_points(group)[name]
    try:
        point.load()
    except InputError:
        raise
    except Exception as error:  # a package may raise anything
        raise InputError(
            f"{group} '{name}': {point.value} of {_package(point)} fails to import: {type(error).__name__}: {error}"
        ) from error
    if (group, name) not in _registered:
        raise InputError(
            f"{group} '{name}': {point.value} of {_package(point)} registers no such variant; it should use "
            f'@distill.registry.register("{group}", "{name}", Options).'
        )


def _package(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


@cache
def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """Entry points of installed packages by name."""
    return {point.name: point for point in metadata.entry_points(group=f"distill.{group}")}


@cache
def builtin_names(group: str) -> list[str]:
    """Names of the group's files with a `class Options`."""
    folder = Path(__file__).parent / GROUPS[group]
    return [path.stem for path in sorted(folder.glob("*.py")) if "\nclass Options(" in path.read_text(encoding="utf-8")]


def _builtin_module(group: str, name: str) -> str:
    return f"distill.{GROUPS[group].replace('/', '.')}.{name}"


class _OptionsLoader(importlib.machinery.SourceFileLoader):
    """Loads only the class `Options` of a built-in variant's file, and the imports without torch."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        tree.body = [statement for statement in tree.body if _is_light(statement)]
        return compile(tree, path, "exec", dont_inherit=True)


@cache
def _builtin_options(group: str, name: str) -> type[Options]:
    """`Options` of a built-in variant, without importing the variant."""
    path = Path(__file__).parent / GROUPS[group] / f"{name}.py"
    loader = _OptionsLoader(f"{_builtin_module(group, name)}.options", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # pydantic looks up the types of annotations there
    loader.exec_module(module)
    options: type[Options] = module.__dict__["Options"]
    return options


def _is_light(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return any(f"{statement.module}.".startswith(f"{allowed}.") for allowed in LIGHT)
    return isinstance(statement, ast.ClassDef) and statement.name == "Options"


def origins(chosen: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Origins of those of these variants (group, name) that are not built in; see `recipe.used`."""
    return {
        f"{group}/{name}": find(group, name).describe()
        for group, name in chosen
        if name not in builtin_names(group) and (group, name) in _registered
    }


def plugins() -> list[str]:
    """Arguments of `load_plugin` so far, for another process."""
    return list(_plugins)


def check_available(variants: Mapping[str, str], where: str) -> None:
    """Raise InputError for the first of these variants, from `origins`, that is missing, with its origin."""
    for key, origin in variants.items():
        group, _, name = key.partition("/")
        if group not in GROUPS or name not in names(group):
            source = origin.partition(" ")[0]
            raise InputError(f"{where}: needs {group} '{name}' of {source}. Give --plugin {source}.")
