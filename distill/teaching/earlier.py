"""Runs that come before a run: the training of its teachers, and the pretraining of its student, from their recipes."""

from __future__ import annotations

from pathlib import Path

from distill import run
from distill.data import Dataset
from distill.errors import InputError
from distill.files.digests import file_digest
from distill.launching.processes import with_precision
from distill.options import StudentOptions
from distill.recipe import FROM_PYTHON, OPERATIONAL_KEYS, Pretrain, Recipe, Teacher, load
from distill.students.saved import WEIGHTS_FILE

Earlier = Teacher | Pretrain
"""What a recipe may train first."""
SHAPE = ("model", "stem", "width", "depths", "heads", "window", "expand", "focal_windows")
"""Options of a student that decide the shapes of its weights, but for what is fitted to another student."""


def earlier_runs(recipe: Recipe) -> list[Earlier]:
    """Everything of a recipe that other recipes train: its student's initial weights, then its teachers."""
    specs: list[Earlier] = [] if recipe.pretrain is None else [recipe.pretrain]
    return specs + [spec for spec in recipe.teachers if spec.recipe is not None]


def recipe_of(recipe: Recipe, spec: Earlier) -> Recipe:
    """The recipe that trains this teacher, or the student's initial weights, with the data root of this recipe.

    Raises:
        InputError: it cannot be read, has other data or another student, or itself needs a run before it; only a
            pretraining may have teachers that recipes train.
    """
    assert spec.recipe is not None
    key, earlier = _key(spec), with_precision(load(spec.recipe))
    if recipe.data.name == FROM_PYTHON:
        earlier = earlier.replace(data=earlier.data.model_copy(update={"name": FROM_PYTHON}))
    if earlier.data.name != recipe.data.name:
        raise InputError(
            f"{key}: {spec.recipe} trains on {earlier.data.name}, the student on {recipe.data.name}. Make data.name "
            "the same."
        )
    if earlier.pretrain is not None or (isinstance(spec, Teacher) and earlier_runs(earlier)):
        what = "a teacher that a recipe trains" if earlier.pretrain is None else "pretraining by a recipe"
        instead = "teacher.model=local-dir:ITS_EXPORT" if isinstance(spec, Teacher) else "student.weights=ITS_EXPORT"
        raise InputError(f"{key}: {spec.recipe} needs {what}. Launch it on its own, then give {instead}.")
    for name in SHAPE if isinstance(spec, Pretrain) else ():
        theirs, ours = (getattr(of.student, name, None) for of in (earlier, recipe))
        if theirs != ours:
            raise InputError(
                f"{key}: {spec.recipe} trains a student of {name} {theirs}, and student.{name} is {ours}. Make "
                "them the same."
            )
    held_out = [of.data.test and (of.data.test, of.data.test_seed) for of in (earlier, recipe)]
    if held_out[0] != held_out[1]:
        raise InputError(
            f"{key}: {spec.recipe} holds out other test images (data.test, data.test_seed): those of this recipe would "
            "have been trained on. Make both the same."
        )
    data = earlier.data.model_copy(update={"root": recipe.data.root})
    return earlier.replace(data=data, train=earlier.train.model_copy(update={"test": True}))


def directory_of(recipe: Recipe, spec: Earlier) -> Path:
    """The run directory of such a recipe; its name has a digest of the recipe."""
    earlier = recipe_of(recipe, spec)
    folder = run.RUNS / ("teachers" if isinstance(spec, Teacher) else "pretrain")
    return folder / f"{earlier.name}-{earlier.digest(OPERATIONAL_KEYS)[:12]}"


def is_trained(recipe: Recipe, spec: Earlier) -> bool:
    """Whether this is ready: it is no recipe, or its recipe's run is finished."""
    return spec.recipe is None or run.is_finished(directory_of(recipe, spec))


def check_trained_on(recipe: Recipe, spec: Earlier, dataset: Dataset) -> None:
    """Raise InputError if the run of this recipe was on other data; images of another size may be the same data."""
    if spec.recipe is None or recipe_of(recipe, spec).data.resolution != recipe.data.resolution:
        return
    directory = directory_of(recipe, spec)
    if run.read_status(directory).get("data_digest") not in (None, dataset.info.digest):
        raise InputError(
            f"{_key(spec)}: {spec.recipe} was trained in {directory} on other data than these. Move that folder away "
            "to train it again."
        )


def initial_student(recipe: Recipe) -> StudentOptions:
    """The student's options, with the export of its pretraining as its weights."""
    if recipe.pretrain is None:
        return recipe.student
    return recipe.student.model_copy(update={"weights": str(directory_of(recipe, recipe.pretrain) / "export")})


def initial_weights_digest(recipe: Recipe) -> dict[str, str]:
    """SHA-256 (hex) of the weights file of the student's pretraining, by its path; empty without one."""
    if recipe.pretrain is None:
        return {}
    path = directory_of(recipe, recipe.pretrain) / "export" / WEIGHTS_FILE
    return {str(path): file_digest(path)}


def _key(spec: Earlier) -> str:
    return "teacher.recipe" if isinstance(spec, Teacher) else "pretrain.recipe"
