"""Builds the frozen teachers of a run, and runs preflight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data import Dataset, Split
from distill.errors import InputError
from distill.evaluation import SMALLEST_BATCH, accuracies, predict
from distill.files.digests import file_digest
from distill.inputs import InputContract
from distill.recipe import FROM_PYTHON, Recipe
from distill.recipe import Teacher as TeacherSpec
from distill.teaching.contracts import candidates, check_contract
from distill.teaching.earlier import check_trained_on, directory_of
from teachers import Ensemble, Teacher, check_accuracy, check_class_order, check_features, load_teacher
from teachers.addresses import parse
from teachers.classes import class_order
from teachers.licences import is_free, remark
from teachers.sources import contract_is_assumed

PREFLIGHT_IMAGES = 5000
PREFLIGHT_RANGES = 10
CONTRACT_IMAGES = 500
ORDER_IMAGES = 30
"""Per class, with training images where the validation split has fewer; for the order of classes."""
MODEL_FILES = (".json", ".safetensors", ".bin", ".pth")
"""Model files in a folder of timm's layout."""
_log = logging.getLogger("distill")


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
        check_trained_on(recipe, spec, dataset)
    teacher = load_frozen(recipe, dataset.info.num_classes, dataset.info.class_names, given)
    _log.info("teacher: %s", teacher.describe())
    if not teacher.num_classes:
        _check_without_classifier(recipe, teacher)
    for member, origin in zip(_members(teacher), teacher.origins, strict=True):
        _log.log(
            logging.INFO if origin.license is None or is_free(origin.license) else logging.WARNING,
            "%s", remark(member.name, origin.license),
        )  # fmt: skip
    return teacher.to(accelerator.device)


def load_frozen(
    recipe: Recipe,
    classes: int,
    names: Sequence[str],
    given: tuple[nn.Module, InputContract] | None = None,
) -> Teacher:
    """The recipe's teacher or ensemble, of which there must be one, on the CPU; `given` as for `build_teacher`.

    Raises:
        InputError: a teacher cannot be loaded, or does not fit these classes.
    """
    specs = _trained(recipe)
    maps_alone = bool(recipe.distill) and not any(section.needs.logits for section in recipe.distill)
    if isinstance(recipe.teacher, list):
        return load_teacher(specs, classes, names)
    if specs[0].model == FROM_PYTHON:
        return _from_python(given, classes, class_order(specs[0], None, names))
    return load_teacher(specs[0], classes, names, any_classifier=maps_alone)


def _check_without_classifier(recipe: Recipe, teacher: Teacher) -> None:
    """Raise InputError if the recipe sets what only a teacher with a classifier has."""
    for key, what in (("min_accuracy", "accuracy"), ("classes", "order of classes"), ("cache", "logits to store")):
        values = [getattr(spec, key) for spec in recipe.teachers]
        if any(value is not None and value is not False for value in values):
            raise InputError(f"teacher.{key}: {teacher.name} has no classifier, so it has no {what}; leave {key} out.")


def _members(teacher: Teacher) -> Sequence[Teacher]:
    return teacher.teachers if isinstance(teacher, Ensemble) else [teacher]


def _from_python(given: tuple[nn.Module, InputContract] | None, num_classes: int, order: list[int] | None) -> Teacher:
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
    return Teacher(FROM_PYTHON, copied, contract, 0 if without_classifier else num_classes, order)


def _trained(recipe: Recipe) -> list[TeacherSpec]:
    """The recipe's teachers, with the exports of those that recipes train."""
    return [
        spec.model_copy(
            update={"ema": None}
            | ({"recipe": None, "model": f"local-dir:{directory_of(recipe, spec) / 'export'}"} if spec.recipe else {})
        )
        for spec in recipe.teachers
    ]


def described_origins(teacher: Teacher) -> dict[str, str]:
    """Licence and base model of a teacher, of an ensemble those of its members in their order; for metadata."""
    models = [origin.base_model for origin in teacher.origins if origin.base_model]
    licences = ", ".join(origin.license or "unknown" for origin in teacher.origins)
    return {"teacher_license": licences, **({"base_model": ", ".join(models)} if models else {})}


def weights_digests(recipe: Recipe, teacher: Teacher | None) -> dict[str, str]:
    """SHA-256 (hex) of the teachers' local files, and of downloaded weights under the model's name."""
    if teacher is None:
        return {}
    members = _members(teacher)
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
    check_contracts(recipe, teacher, dataset, accelerator)
    split, members, keys = _asked(recipe, teacher, dataset)
    models = list(dict.fromkeys([*members, teacher]))  # the last output is the ensemble's
    size = dataset.info.sizes[split]
    ranges = _ranges(size, size if split == "validation" else PREFLIGHT_IMAGES)
    labels, outputs = _sample(models, dataset, split, accelerator, ranges)
    described = {
        "split": split,
        "samples": len(outputs[-1]),
        "teacher": teacher.describe(),
        "teacher_sha256": teacher.digest,
        **described_origins(teacher),
    }
    if not teacher.num_classes:
        check_features(teacher, outputs[-1])
        _log.info("preflight: outputs of the teacher are finite and differ on %d %s images", len(outputs[-1]), split)
        return described, None
    logits = outputs[-1]
    names = dataset.info.class_names
    few = min(ORDER_IMAGES * len(names) - len(labels), PREFLIGHT_IMAGES)
    more: tuple[Tensor, list[Tensor]] = labels[:0], [values[:0] for values in outputs]
    if split == "validation" and few > 0 and any(spec.classes is None for spec in recipe.teachers):
        more = _sample(members, dataset, "train", accelerator, _ranges(dataset.info.sizes["train"], few))
    for member, own, others, spec, key in zip(members, outputs, more[1], recipe.teachers, keys, strict=False):
        if spec.classes is None:
            all_labels, all_logits = torch.cat([labels, more[0]]), torch.cat([own, others])
            check_class_order(member, all_labels, all_logits, names, key=key)
        check_accuracy(member, labels, own, min_accuracy=spec.min_accuracy)
    values = accuracies({"teacher": logits}, labels)
    _log.info("preflight: teacher top-1 %.2f %% on %d %s images", values["teacher/top1"], len(labels), split)
    return described | values, logits


def check_contracts(recipe: Recipe, teacher: Teacher, dataset: Dataset, accelerator: Accelerator) -> None:
    """Measure teachers whose weights do not say how their inputs were prepared under the likely contracts.

    Raises:
        InputError: another one than the library's is markedly better; the message has the keys to set.
    """
    split, members, keys = _asked(recipe, teacher, dataset)
    for member, spec, key in zip(members, _trained(recipe), keys, strict=True):
        if member.num_classes and contract_is_assumed(spec):
            under = candidates(spec, member, dataset.info, recipe.data.resolution)
            ranges = _ranges(dataset.info.sizes[split], CONTRACT_IMAGES)
            sample, answers = _sample(under, dataset, split, accelerator, ranges)
            check_contract(under, sample, answers, spec, key)


def _asked(recipe: Recipe, teacher: Teacher, dataset: Dataset) -> tuple[Split, Sequence[Teacher], list[str]]:
    """The split on which teachers are checked, each teacher (a good ensemble can hide a member with wrong inputs), and
    its key in the recipe.
    """
    split: Split = "validation" if dataset.info.sizes.get("validation") else "train"
    members = _members(teacher)
    keys = [f"teacher.{index}" if isinstance(recipe.teacher, list) else "teacher" for index in range(len(members))]
    return split, members, keys


def _sample(
    models: Sequence[Teacher], dataset: Dataset, split: Split, accelerator: Accelerator, ranges: list[tuple[int, int]]
) -> tuple[Tensor, list[Tensor]]:
    """Labels int64 [N] of these ranges of a split, and the output [N, ...] of each model."""
    parts = [
        predict(
            lambda images: [model(images) for model in models],
            dataset,
            split,
            accelerator,
            batch_size=SMALLEST_BATCH,
            start=start,
            stop=stop,
            what="preflight",
        )
        for start, stop in ranges
    ]
    labels = torch.cat([dataset.labels(split)[start:stop] for start, stop in ranges])
    return labels, [torch.cat(part) for part in zip(*parts, strict=True)]


def _ranges(size: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of up to `most` images of a split of `size`: all, or evenly spaced ranges of equal length."""
    if size <= most:
        return [(0, size)]
    count = min(PREFLIGHT_RANGES, most)
    length = most // count
    starts = [(size - length) * part // max(1, count - 1) for part in range(count)]
    return [(start, start + length) for start in starts]
