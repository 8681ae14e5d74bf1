"""Builds the frozen teachers of a run, finds their own training runs, and runs preflight."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill import run
from distill.data import Dataset, Split
from distill.errors import InputError
from distill.evaluation import SMALLEST_BATCH, accuracies, predict
from distill.files.digests import file_digest
from distill.inputs import InputContract
from distill.launching.processes import with_precision
from distill.recipe import FROM_PYTHON, OPERATIONAL_KEYS, Recipe, load
from distill.recipe import Teacher as TeacherSpec
from teachers import Ensemble, Teacher, check_accuracy, check_features, load_teacher
from teachers.sources import parse

PREFLIGHT_IMAGES = 5000
PREFLIGHT_RANGES = 10
MODEL_FILES = (".json", ".safetensors", ".bin", ".pth")
"""Model files in a folder of timm's layout."""
_log = logging.getLogger("distill")


def teacher_recipe(recipe: Recipe, spec: TeacherSpec) -> Recipe:
    """The recipe that trains this teacher, with the data root of the student's recipe.

    Raises:
        InputError: it cannot be read, has other data, or itself needs a teacher that a recipe trains.
    """
    assert spec.recipe is not None
    teacher = with_precision(load(spec.recipe))
    if recipe.data.name == FROM_PYTHON:
        teacher = teacher.replace(data=teacher.data.model_copy(update={"name": FROM_PYTHON}))
    if teacher.data.name != recipe.data.name:
        raise InputError(
            f"teacher.recipe: {spec.recipe} trains on {teacher.data.name}, the student on {recipe.data.name}. "
            "Make data.name the same."
        )
    if any(its_teacher.recipe for its_teacher in teacher.teachers):
        raise InputError(
            f"teacher.recipe: {spec.recipe} needs a teacher that a recipe trains. Launch it on its own, then give "
            "teacher.model=local-dir:ITS_EXPORT."
        )
    return teacher.replace(data=teacher.data.model_copy(update={"root": recipe.data.root}))


def teacher_directory(recipe: Recipe, spec: TeacherSpec) -> Path:
    """The run directory of a teacher's recipe; its name has a digest of the recipe."""
    teacher = teacher_recipe(recipe, spec)
    return run.RUNS / "teachers" / f"{teacher.name}-{teacher.digest(OPERATIONAL_KEYS)[:12]}"


def is_trained(recipe: Recipe, spec: TeacherSpec) -> bool:
    """Whether this teacher is ready: it is no recipe, or its recipe's run is finished."""
    return spec.recipe is None or run.is_finished(teacher_directory(recipe, spec))


def build_teacher(
    recipe: Recipe,
    dataset: Dataset,
    accelerator: Accelerator,
    given: tuple[nn.Module, InputContract] | None = None,
) -> Teacher | None:
    """The recipe's teacher or ensemble, frozen, on the device; teachers that recipes train are loaded from exports.

    Args:
        given: module and contract of the name 'python'; the module is copied.

    Raises:
        InputError: a teacher cannot be loaded, or does not fit the data.
    """
    if not recipe.teachers:
        return None
    for spec in recipe.teachers:
        directory = teacher_directory(recipe, spec) if spec.recipe else None
        trained_on = run.read_status(directory).get("data_digest") if directory else None
        if trained_on not in (None, dataset.info.digest):
            raise InputError(
                f"teacher.recipe: {spec.recipe} was trained in {directory} on other data than these. Move that folder "
                "away to train it again."
            )
    specs, classes = _trained(recipe), dataset.info.num_classes
    if isinstance(recipe.teacher, list):
        teacher = load_teacher(specs, classes)
    elif specs[0].model == FROM_PYTHON:
        teacher = _from_python(given, classes)
    else:
        teacher = load_teacher(specs[0], classes)
    _log.info("teacher: %s", teacher.describe())
    return teacher.to(accelerator.device)


def _from_python(given: tuple[nn.Module, InputContract] | None, num_classes: int) -> Teacher:
    if given is None:
        raise InputError(
            f"teacher.model: '{FROM_PYTHON}' needs a module from Python code: "
            "distill.train(..., teacher=(module, distill.Contract(...))). Or name another model."
        )
    network, contract = given
    try:
        copied = copy.deepcopy(network)
    except Exception as error:  # modules may hold any object
        raise InputError(f"teacher: the module cannot be copied ({type(error).__name__}: {error}).") from error
    without_classifier = getattr(copied, "num_classes", None) == 0  # as in timm
    return Teacher(FROM_PYTHON, copied, contract, 0 if without_classifier else num_classes)


def _trained(recipe: Recipe) -> list[TeacherSpec]:
    """The recipe's teachers, with the exports of those that recipes train."""
    return [
        spec.model_copy(update={"recipe": None, "model": f"local-dir:{teacher_directory(recipe, spec) / 'export'}"})
        if spec.recipe
        else spec
        for spec in recipe.teachers
    ]


def weights_digests(recipe: Recipe, teacher: Teacher | None) -> dict[str, str]:
    """SHA-256 (hex) of the teachers' local files, and of downloaded weights under the model's name."""
    if teacher is None:
        return {}
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    digests: dict[str, str] = {}
    for spec, member in zip(_trained(recipe), members, strict=True):
        assert spec.model is not None
        files = [Path(spec.weights)] if spec.weights else []
        scheme, name = parse(spec.model)
        if scheme == "local-dir":
            files += sorted(path for path in Path(name).iterdir() if path.suffix in MODEL_FILES)
        for path in files:
            digests[str(path)] = file_digest(path)
        if not files:
            digests[spec.model] = member.digest
    return digests


def run_preflight(
    recipe: Recipe, teacher: Teacher, dataset: Dataset, accelerator: Accelerator
) -> tuple[dict[str, Any], Tensor | None]:
    """Check the accuracy of the teacher, and of each member of an ensemble, with the inputs of training.

    On the validation split; without one on 5,000 unaugmented training images from evenly spaced ranges of the split,
    since folders are sorted by class. A teacher without a classifier has no accuracy: its outputs have to be finite and
    to differ between images.

    Returns:
        The values for `metrics.jsonl`, and the teacher's logits [N, classes] on that split, if it has any.

    Raises:
        InputError: a teacher is worse than its `min_accuracy`, or its outputs are unusable; the message names the
            likely causes.
    """
    if not teacher.num_classes and any(spec.min_accuracy is not None for spec in recipe.teachers):
        raise InputError(
            f"teacher.min_accuracy: {teacher.name} has no classifier, so it has no accuracy; leave min_accuracy out."
        )
    split: Split = "validation" if dataset.info.sizes.get("validation") else "train"
    # Each member is checked: a good ensemble can hide a member with wrong inputs. The last output is the ensemble's.
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    models = list(dict.fromkeys([*members, teacher]))
    ranges = _ranges(dataset.info.sizes[split], whole=split == "validation")
    parts = [
        predict(
            lambda images: [model(images) for model in models],
            dataset,
            split,
            accelerator,
            batch_size=SMALLEST_BATCH,
            start=start,
            stop=stop,
        )
        for start, stop in ranges
    ]
    outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
    described = {
        "split": split,
        "samples": len(outputs[-1]),
        "teacher": teacher.describe(),
        "teacher_sha256": teacher.digest,
    }
    if not teacher.num_classes:
        check_features(teacher, outputs[-1])
        _log.info("preflight: outputs of the teacher are finite and differ on %d %s images", len(outputs[-1]), split)
        return described, None
    logits = outputs[-1]
    labels = torch.cat([dataset.labels(split)[start:stop] for start, stop in ranges])
    for member, member_logits, spec in zip(members, outputs, recipe.teachers, strict=False):
        check_accuracy(member, labels, member_logits, min_accuracy=spec.min_accuracy)
    values = accuracies({"teacher": logits}, labels)
    _log.info("preflight: teacher top-1 %.2f %% on %d %s images", values["teacher/top1"], len(labels), split)
    return described | values, logits


def _ranges(size: int, *, whole: bool) -> list[tuple[int, int]]:
    """(start, stop) of the images for preflight: the whole split, or evenly spaced ranges."""
    if whole or size <= PREFLIGHT_IMAGES:
        return [(0, size)]
    length = PREFLIGHT_IMAGES // PREFLIGHT_RANGES
    starts = [(size - length) * part // (PREFLIGHT_RANGES - 1) for part in range(PREFLIGHT_RANGES)]
    return [(start, start + length) for start in starts]
