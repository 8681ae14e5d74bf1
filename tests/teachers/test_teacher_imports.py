from __future__ import annotations

import ast
from pathlib import Path

import teachers

FOLDER = Path(teachers.__file__).parent
ALLOWED = {
    "distill.recipe", "distill.recipe.reading", "distill.errors", "distill.features", "distill.inputs",
    "distill.files.digests", "distill.files.regular", "distill.files.plain_data", "distill.files.records",
    "distill.out_of_memory",
}  # fmt: skip


def _distill_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports"
            names = {alias.name for alias in node.names}
            found |= {f"{node.module}.{name}" for name in names} if node.module == "distill" else {str(node.module)}
    return {name for name in found if name.partition(".")[0] == "distill"}


def test_teachers_know_little_of_distill() -> None:
    """And of the students only their names, when an exported folder is opened."""
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        lazy = set().union(*(_distill_imports(function) for function in functions))
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert _distill_imports(tree) <= ALLOWED, file.name
        assert lazy <= {"distill.students"}, file.name
