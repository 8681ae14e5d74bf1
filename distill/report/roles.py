"""What the model that a run trained is to the other runs in a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from distill.report.runs import RunFiles

STUDENT, CONTROL, TEACHER, ALONE = "student", "control", "teacher", "student without teacher"
TEACHERS = "teachers"
"""Folder of the runs that train teachers."""


def roles_of(runs: Mapping[str, RunFiles]) -> dict[str, str]:
    """By run: 'student'; 'control' if it would be that of another run here, or is in another's folder; 'teacher' if
    another run here had it as its teacher, or it is where teachers are trained; 'student without teacher' otherwise.
    """
    return {name: _role(run, list(runs.values())) for name, run in runs.items()}


def _role(run: RunFiles, runs: list[RunFiles]) -> str:
    if not run.whole_recipe or "distill" not in run.recipe or run.recipe["distill"] or run.recipe.get("teacher"):
        return STUDENT
    path = run.path.resolve()
    controls = {other.control_digest for other in runs} - {None}
    if run.recipe_digest in controls or path.name == "control":
        return CONTROL
    exports = {PurePath(file).parent for other in runs for file in other.status.get("teacher_weights") or {}}
    if path.parent.name == TEACHERS or any(export.parts[-2:] == (path.name, "export") for export in exports):
        return TEACHER
    return ALONE
