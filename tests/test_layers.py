"""Who may import whom: one ordered list of layers over every kind of import, and no cycle among files."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    "distill",
    "distill.train",
    "distill.cli",
    "distill.api",
    "distill.evaluate_command",
    "distill.completion",
    "distill.measuring",
    "distill.sweeps",
    "distill.shipped",
    "distill.validation",
    "distill.listing",
    "distill.bench",
    "distill.scaffold",
    "distill.dry_run",
    "distill.pipeline",
    "distill.finishing",
    "distill.resumption",
    "distill.trainer",
    "distill.training",
    "distill.teaching",
    "distill.training.compilation",
    "distill.tracking",
    "distill.results",
    "distill.exports",
    "distill.analysis",
    "distill.evaluation",
    "teachers",
    "distill.students",
    "distill.methods",
    "distill.report",
    "distill.run",
    "distill.checkpoint",
    "distill.environment",
    "distill.given",
    "distill.out_of_memory",
    "distill.data",
    "distill.console",
    "distill.files",
    "distill.launching",
    "teachers.cifar_resnet",
    "teachers.addresses",
    "teachers.zoo",
    "distill.recipe",
    "distill.registry",
    "distill.options",
    "distill.features",
    "distill.flops",
    "distill.inputs",
    "distill.commandline",
    "distill.cores",
    "distill.faults",
    "distill.errors",
    "distill.version",
]
"""From top to bottom: modules import from their own layer and from those below it. A module belongs to the longest name
here that it begins with.
"""


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, for all of distill and teachers."""
    found = {}
    for path in sorted([*(ROOT / "distill").rglob("*.py"), *(ROOT / "teachers").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, known: Iterable[str]) -> set[str]:
    """What a file imports, of `known` modules and of other packages: at the top, within functions, for type checkers,
    by `import_module("a.b")` or `import_module(f"a.{name}")` (every module in a), and as a string "a.b:name".
    `from a import b` is of `a.b` where that is a module, else of `a`.
    """
    return {name for node in ast.walk(ast.parse(source)) for name in _imports(node, set(known))}


def _imports(node: ast.AST, known: set[str]) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=base, names=names, level=level):
            assert level == 0, "imports are absolute"
            yield from (name if (name := f"{base}.{alias.name}") in known else base or "" for alias in names)
        case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _imports_by_name(node):
            yield name
        case ast.Call(args=[ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]), *_]) if _imports_by_name(node):
            yield from (name for name in known if name.startswith(start))
        case ast.Constant(value=str(text)) if found := re.fullmatch(r"(\w+(?:\.\w+)+):\w+", text):
            if found[1] in known:
                yield found[1]


def _imports_by_name(call: ast.Call) -> bool:
    return ast.unparse(call.func).rpartition(".")[2] in ("import_module", "__import__")


MODULES = source_files()
IMPORTS = {name: imports_of(path.read_text(encoding="utf-8"), MODULES) - {name} for name, path in MODULES.items()}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer_of(module: str) -> str:
    # The facade is a layer without what is in the package.
    names = [name for name in LAYERS if within(module, name) and (name != "distill" or module == "distill")]
    assert names, f"{module} has no place in LAYERS"
    return max(names, key=len)


def test_arrows_go_down() -> None:
    height = {name: LAYERS.index(layer_of(name)) for name in MODULES}
    upwards = {
        (name, found)
        for name, imports in IMPORTS.items()
        for found in imports & MODULES.keys()
        if height[found] < height[name]
    }
    assert upwards == set()
    assert {layer_of(name) for name in MODULES} == set(LAYERS), "a layer that is no more"


def test_files_have_no_cycle() -> None:
    graph = {name: imports & MODULES.keys() for name, imports in IMPORTS.items()}
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the files on the cycle


NOT_THERE = {
    "distill.recipe": ("torch", "torchvision", "timm", "accelerate", "numpy"),
    "distill.registry": ("torch", "torchvision", "timm", "accelerate", "numpy"),
    "distill.options": ("torch", "torchvision", "timm", "accelerate", "numpy"),
    "distill.report": ("torch", "torchvision", "timm", "accelerate", "distill.launching"),
    "distill.data": ("timm.models",),
    "distill.scaffold.rules": ("torch", "numpy", "pydantic"),
    "distill.scaffold.contents": ("torch", "numpy"),
}
"""What would cost seconds of start, or a model where only files are to be read."""


@pytest.mark.parametrize("package", NOT_THERE)
def test_packages_do_without(package: str) -> None:
    pairs = {(name, found) for name in MODULES if within(name, package) for found in IMPORTS[name]}
    assert pairs
    assert {pair for pair in pairs if within(pair[1], *NOT_THERE[package])} == set()


@pytest.mark.parametrize("package", ["distill.methods", "distill.students.attention"])
def test_variants_import_what_a_plugin_would(package: str) -> None:
    """torch, what variants are made of, and one another."""
    pairs = {(name, found) for name in MODULES if within(name, package) for found in IMPORTS[name]}
    allowed = ("torch", "pydantic", "distill.options", "distill.registry", "distill.features", package)
    own = {pair for pair in pairs if pair[1].split(".")[0] not in sys.stdlib_module_names}
    assert own
    assert {pair for pair in own if not within(pair[1], *allowed)} == set()


def test_the_package_itself_imports_nothing_when_loaded() -> None:
    """`import distill` comes before every other import of the project: what it imports, everything does."""
    imports = [
        node
        for node in ast.parse(MODULES["distill"].read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {name for node in imports for name in _imports(node, set(MODULES))} <= {
        "__future__",
        "typing",
        "distill.version",
    }


def test_the_command_listens_to_signals_before_it_imports_what_takes_long() -> None:
    code = "import distill.cli, sys; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


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
ENTRY = {"here": "distill.cli:main", "elsewhere": "os.path:join", "time": "12:30"}
class A:
    import yaml
    def f(self):
        if True:
            from distill import trainer
        importlib.import_module("distill.run")
        import_module(f"distill.report.{self}")
"""
    known = {
        "distill", "distill.data", "distill.data.folder", "distill.trainer", "distill.cli", "distill.run",
        "distill.report", "distill.report.page", "distill.reported",
    }  # fmt: skip
    with pytest.raises(AssertionError, match="absolute"):
        imports_of(source, known)
    assert imports_of(source.replace("from . import relative", ""), known) == {
        "typing", "torch.nn", "distill.data.folder", "distill.data", "timm", "scipy", "safetensors", "distill.cli",
        "yaml", "distill.trainer", "distill.run", "distill.report.page",
    }  # fmt: skip


def test_a_module_belongs_to_the_longest_name() -> None:
    assert layer_of("teachers.cifar_resnet") == "teachers.cifar_resnet"
    assert layer_of("teachers.sources") == "teachers"
    assert layer_of("distill.data.folder") == "distill.data"
    assert layer_of("distill") == "distill"
    with pytest.raises(AssertionError, match="no place"):
        layer_of("distill.datasets")
