"""Finds variants by name: built in, from installed packages (entry points) and from plugins given by hand.

A variant is an attention kind, a student, a distillation method, a source of what teaches, or a dataset reader: one
module that holds its options, its checks and its code, and registers its class:

    @register("methods", "hard", Options)
    class Hard(Method): ...

Recipes are data: they name variants and load nothing. A name stands for a file of this package, for an entry point of
an installed package (group `distill.methods`, ...), or for what a `--plugin` registered.
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
"""Group -> the folder of its built-in variants, one a file, under the variant's name."""
LIGHT = ("__future__", "collections", "typing", "pydantic", "distill.options", "distill.recipe")
"""What a variant's options may import: nothing of it imports torch."""
Implementation = TypeVar("Implementation", bound=type)


@dataclass(frozen=True)
class Variant:
    """What stands behind a name."""

    group: str
    name: str
    options: type[Options]
    implementation: Any
    origin: str
    """The module that brought it, or the plugin file."""

    def describe(self) -> str:
        """Module and version, or file and hash: what a resumed run has to have again."""
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
            raise InputError(f"{origin}: {group} '{name}' is there already, from {known.origin}. Rename one of them.")
        if name in builtin_names(group) and origin != _builtin_module(group, name):
            raise InputError(f"{origin}: {group} '{name}' is built in. Give yours another name.")
        _registered[group, name] = Variant(group, name, options, implementation, origin)
        return implementation

    return add


def find(group: str, name: str) -> Variant:
    """The variant of that name, imported.

    Raises:
        InputError: nothing that is installed or loaded has it.
    """
    if (group, name) not in _registered:
        if name in builtin_names(group):
            importlib.import_module(_builtin_module(group, name))
        elif name in entry_points(group):
            _load_entry_point(group, name)
    if (group, name) not in _registered:
        known = ", ".join(names(group))
        raise InputError(
            f"{group} '{name}' is not there; known are {known}. If a plugin brings it, give --plugin MODULE|FILE.py."
        )
    return _registered[group, name]


def names(group: str) -> list[str]:
    """Every name that a recipe can use: built-in ones first."""
    loaded = (name for of, name in _registered if of == group)
    return list(dict.fromkeys([*builtin_names(group), *loaded, *entry_points(group)]))


def options_of(group: str, names: Iterable[str] = ()) -> dict[str, type[Options]]:
    """Name -> options of the built-in variants, of what is loaded, and of these `names` where a package brings them.

    Those of built-in variants are read without importing the variant, and torch with it; they are these classes also
    where the variant has been imported since.
    """
    found = {name: _builtin_options(group, name) for name in builtin_names(group)}
    for name in names:
        if name not in found and name in entry_points(group):
            find(group, name)
    others = {name: known.options for (of, name), known in _registered.items() if of == group and name not in found}
    return found | others


def load_plugin(target: str) -> None:
    """Import a module, or a Python file (`FILE.py`), for what it registers. A second time does nothing, unless the file
    has changed: then it is imported anew in place of the first.

    Raises:
        InputError: it is not there, fails to import, or registers a name that is taken.
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
    except Exception as error:  # of a stranger's code: anything
        raise InputError(f"--plugin {target}: fails to import: {type(error).__name__}: {error}") from error


def _load_entry_point(group: str, name: str) -> None:
    point = entry_points(group)[name]
    try:
        point.load()
    except InputError:
        raise
    except Exception as error:  # of a stranger's package: anything
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
    """Those of installed packages by name; the package of a name that stands twice is named when it is loaded."""
    return {point.name: point for point in metadata.entry_points(group=f"distill.{group}")}


@cache
def builtin_names(group: str) -> list[str]:
    """The files of the group's folder that have options of their own."""
    folder = Path(__file__).parent / GROUPS[group]
    return [path.stem for path in sorted(folder.glob("*.py")) if "\nclass Options(" in path.read_text(encoding="utf-8")]


def _builtin_module(group: str, name: str) -> str:
    return f"distill.{GROUPS[group].replace('/', '.')}.{name}"


class _OptionsLoader(importlib.machinery.SourceFileLoader):
    """Loads, of the file of a built-in variant, the class `Options` alone, and the imports that need no torch."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        tree.body = [statement for statement in tree.body if _is_light(statement)]
        return compile(tree, path, "exec", dont_inherit=True)


@cache
def _builtin_options(group: str, name: str) -> type[Options]:
    """`Options` of a built-in variant, which is not imported itself."""
    path = Path(__file__).parent / GROUPS[group] / f"{name}.py"
    loader = _OptionsLoader(f"{_builtin_module(group, name)}.options", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where pydantic looks up the types that annotations name
    loader.exec_module(module)
    options: type[Options] = module.__dict__["Options"]
    return options


def _is_light(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return any(f"{statement.module}.".startswith(f"{allowed}.") for allowed in LIGHT)
    return isinstance(statement, ast.ClassDef) and statement.name == "Options"


def origins(chosen: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of these variants, (group, name), those that are not built in: 'methods/queue' -> module and version, or file and
    hash.
    """
    return {
        f"{group}/{name}": find(group, name).describe()
        for group, name in chosen
        if name not in builtin_names(group) and (group, name) in _registered
    }


def plugins() -> list[str]:
    """What `load_plugin` was given so far, for a process that is to have the same."""
    return list(_plugins)


def check_available(variants: Mapping[str, str], where: str) -> None:
    """Raise InputError for the first of these variants, as `origins` describes them, that is not there; it says what
    brings it.
    """
    for key, origin in variants.items():
        group, _, name = key.partition("/")
        if name not in names(group):
            source = origin.partition(" ")[0]
            raise InputError(f"{where}: needs {group} '{name}', which {source} brings. Give --plugin {source}.")
