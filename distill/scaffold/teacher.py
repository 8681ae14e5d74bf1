"""The teacher of `distill init`: a name of a library, or a file whose architecture and inputs are found out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.data.dataset import Dataset
from distill.errors import InputError
from distill.inputs import InputContract
from distill.recipe import Teacher as Spec
from distill.report.metrics import decisions
from distill.teaching.contracts import candidates, preferred
from teachers import Teacher, load_teacher
from teachers.recognition import recognise
from teachers.sources import classes_of_weights, contract_is_assumed, untrained_source

SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".safetensors")
SIZES = (32, 64, 128, 224)
"""In pixels, that are tried beside those of the library and the data."""
SECONDS = 8.0
"""For measurements of inputs."""
FEWEST, MOST = 32, 500
"""Images that inputs are measured on."""
BATCH = 32
REMEDY = (
    "Fine-tune it on these classes, or leave --teacher out: the recipe then trains a teacher first"
    " (student.pretrained=true in that recipe begins with timm's weights). Its feature maps alone can teach, too: in a"
    " recipe with guide as the only method."
)


class Chosen(NamedTuple):
    section: dict[str, Any]
    """Of the recipe."""
    teacher: Teacher
    """With random weights where those of a name would have to be downloaded: for the cost of a step."""
    logits: bool
    maps: bool
    said: str
    """What was found, for the console."""
    note: str
    """The same as a short comment in the recipe."""
    warning: str | None = None


def check_teacher(given: str, class_names: tuple[str, ...]) -> tuple[Spec, tuple[str, ...]]:
    """The recipe's section of a name, a file or a folder, and other architectures that the file may be of.

    Raises:
        InputError: there is nothing of that name, the file fits no architecture, or it has other classes.
    """
    path = Path(given)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        found = recognise(path)
        _same_number(f"{given} ({found.model})", found.num_classes, class_names)
        one = [0.5] if found.channels == 1 else None  # as many numbers as channels; which, is measured
        return Spec(model=found.model, weights=given, mean=one, std=one), found.alike
    spec = Spec(model=f"local-dir:{given}" if (path / "config.json").is_file() else given)
    try:
        _same_number(given, classes_of_weights(spec), class_names)
    except InputError as error:
        raise InputError(str(error).replace("teacher.model:", "--teacher:", 1)) from None
    return spec, ()


def _same_number(what: str, theirs: int | None, class_names: tuple[str, ...]) -> None:
    if theirs not in (None, 0, len(class_names)):
        raise InputError(f"--teacher: {what} has {theirs:,} classes, the folder has {len(class_names)}. {REMEDY}")


def of_spec(spec: Spec, alike: tuple[str, ...], dataset: Dataset, resolution: int, device: torch.device) -> Chosen:
    """The teacher, and of a file the input size and normalisation with which it is best on the sample."""
    assert spec.model is not None
    classes = dataset.info.num_classes
    if spec.weights is None:
        source = untrained_source(spec, classes)
        teacher = Teacher(spec.model, source.network, source.contract, source.num_classes)
        contract = teacher.contract
        said = f"{spec.model}: {teacher.num_parameters / 1e6:.2f} M parameters, inputs {contract}"
        return _chosen({"model": spec.model}, teacher, resolution, said, f"inputs by its library: {contract.size} px")
    teachers = [load_teacher(spec.model_copy(update={"model": name}), classes) for name in (spec.model, *alike)]
    section: dict[str, Any] = {"model": spec.model, "weights": spec.weights}
    said = f"{spec.model}: {teachers[0].num_parameters / 1e6:.2f} M parameters"
    open_spec = spec.model_copy(update={"mean": None, "std": None})
    if not teachers[0].num_classes or not contract_is_assumed(open_spec):
        if spec.mean is not None:
            section |= {"mean": spec.mean, "std": spec.std}
        contract = teachers[0].contract
        note = f"recognised by its tensors; inputs by its library: {contract.size} px"
        return _chosen(section, teachers[0], resolution, f"{said}, inputs {contract}", note)
    best, right, images, chance = _best(open_spec, teachers, dataset, resolution, device)
    contract = best.contract
    section = {"model": best.name, "weights": spec.weights, "size": contract.size}
    for key, values in (("mean", contract.mean), ("std", contract.std)):
        section[key] = [float(f"{value:.5g}") for value in values]
    said = (
        f"{best.name}: {best.num_parameters / 1e6:.2f} M parameters, "
        f"{right:.1%} right on {images} training images with inputs {contract}"
    )
    warning = None
    if right < chance + 2 * math.sqrt(chance * (1 - chance) / images):
        warning = (
            f"{spec.weights}: {right:.1%} right on {images} training images of {classes} classes, hardly more than by "
            "chance: preflight would stop the run. Is it trained on these classes, in the order of the folders' names "
            "(else teacher.classes)?"
        )
    note = f"recognised by its tensors; {right:.1%} of {images} training images right with these inputs"
    return _chosen(section, best, resolution, said, note)._replace(warning=warning)


def trained_first(name: str, dataset: Dataset, resolution: int, recipe: Path) -> Chosen:
    """The teacher that a recipe trains: its network with random weights."""
    source = untrained_source(Spec(model=name), dataset.info.num_classes)
    mean, std = (values * 3 if len(values) == 1 else values for values in (dataset.info.mean, dataset.info.std))
    contract = InputContract(mean, std, resolution)
    teacher = Teacher(name, source.network, contract, dataset.info.num_classes)
    said = f"{name}, trained first by {recipe}"
    return _chosen({"recipe": str(recipe)}, teacher, resolution, said, f"{name}, trained first, once")


def _chosen(section: Mapping[str, Any], teacher: Teacher, resolution: int, said: str, note: str) -> Chosen:
    try:
        maps = bool(teacher.map_shapes(resolution))
    except InputError:
        maps = False
    if not maps and not teacher.num_classes:
        raise InputError(f"--teacher: {teacher.name} has neither a classifier nor feature maps to learn from.")
    return Chosen(dict(section), teacher, bool(teacher.num_classes), maps, said, note)


def _best(
    spec: Spec, teachers: list[Teacher], dataset: Dataset, resolution: int, device: torch.device
) -> tuple[Teacher, float, int, float]:
    """The teacher under the inputs that preflight prefers, its accuracy (0 to 1), on how many images, and what chance
    would give.
    """
    tried: list[Teacher] = []
    for size in (resolution, *SIZES):
        for one in candidates(spec, teachers[0].to(device), dataset.info, size):
            if all(one.contract != other.contract for other in tried):
                tried.append(one)
    labels = dataset.labels("train")
    start = time.monotonic()
    _logits(tried, dataset, [0, len(labels) - 1])
    number = int(min(max(FEWEST, 2 * SECONDS / (time.monotonic() - start)), MOST, len(labels)))
    rows = torch.linspace(0, len(labels) - 1, number).long()
    # The library's inputs come first: they are taken unless others are markedly better; so are other architectures.
    logits = _logits(tried, dataset, rows.tolist())
    best = preferred(labels[rows], logits)
    contracts = dict.fromkeys((teachers[0].contract, tried[best].contract))
    others = [other.to(device).under(contract) for other in teachers[1:] for contract in contracts]
    tried, logits = [tried[best], *others], [logits[best], *_logits(others, dataset, rows.tolist())]
    best = preferred(labels[rows], logits)
    rights = decisions(logits[best].numpy()) == labels[rows].numpy()
    chance = max(1 / logits[best].shape[1], int(labels[rows].bincount().max()) / number)
    return tried[best], float(rights.mean()), number, chance


@torch.inference_mode()
def _logits(models: list[Teacher], dataset: Dataset, rows: list[int]) -> list[Tensor]:
    """Of each model on these training images, [rows, classes] on the CPU."""
    found: list[list[Tensor]] = [[] for _ in models]
    for first in range(0, len(rows), BATCH):
        of_rows = [dataset.evaluation_batches("train", row, row + 1, 1) for row in rows[first : first + BATCH]]
        images = torch.cat([next(batches)[0] for batches in of_rows])
        for outputs, model in zip(found, models, strict=True):
            outputs.append(model(images).cpu())
    return [torch.cat(outputs) for outputs in found]
