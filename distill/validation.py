"""What a recipe names and is not there, as far as files and the source of installed packages tell without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.options import Key, Problem
from distill.recipe import FROM_PYTHON, Recipe, Teacher, reader_names, reader_of
from distill.recipe.initialization import Select
from distill.recipe.installed import old_timm_models, optimizers, own_students, timm_models, torchvision_models
from teachers.addresses import parse
from teachers.zoo import ZOO

SUGGESTED = 3
FOLDERS = ("folder", "imagenet")
"""Values of `data.name` whose images are in a folder, `data.root`."""


def missing(recipe: Recipe, *, plugins: bool) -> Iterator[Problem]:
    """Names that nothing has, and files that are not there.

    Args:
        plugins: whether plugins are loaded: they may register any model or optimizer.
    """
    yield from _data(recipe)
    for index, teacher in enumerate(recipe.teachers):
        at: Key = ("teacher", index) if isinstance(recipe.teacher, list) else ("teacher",)
        yield from _teacher(teacher, at, plugins)
    if recipe.student.family == "timm_model" and not plugins:
        yield from _unknown(recipe.student.model, [*own_students(), *timm_models()], ("student", "model"))
    if (weights := recipe.student.weights) is not None and not (Path(weights) / "config.json").is_file():
        yield Problem((("student", "weights"),), f"no export there: {weights}")
    if isinstance(init := getattr(recipe.student, "init", None), Select) and init.source:
        if init.folder is None and not plugins:
            yield from _unknown(init.source, timm_models(), ("student", "init", "source"))
        elif init.folder is not None and not (init.folder / "config.json").is_file():
            yield Problem((("student", "init", "source"),), f"no export there: {init.folder}")
    if not plugins:
        yield from _unknown(recipe.optim.name, optimizers(), ("optim", "name"))


def doubtful(recipe: Recipe) -> Iterator[str]:
    """What can be run and is rarely meant."""
    if recipe.optim.warmup_epochs >= recipe.train.epochs:
        yield (
            f"optim.warmup_epochs: {recipe.optim.warmup_epochs:g} of train.epochs {recipe.train.epochs}: the learning "
            "rate only rises"
        )


def _data(recipe: Recipe) -> Iterator[Problem]:
    name, root = recipe.data.name, Path(recipe.data.root)
    if reader_of(name) is None:
        yield from _unknown(name, reader_names(), ("data", "name"))
    elif name in FOLDERS and not root.is_dir():
        yield Problem((("data", "root"),), f"no such folder: {root}")
    elif name in FOLDERS and isinstance(weights := recipe.data.class_weights, list):
        classes = _class_folders(root / "train" if (root / "train").is_dir() else root)
        if len(weights) != len(classes):
            yield Problem(
                (("data", "class_weights"),),
                f"{len(weights)} weights for {len(classes)} classes; give one for each of {', '.join(classes)}",
            )
    elif name.endswith((".safetensors", ".csv")) and not (root / name).is_file() and not Path(name).is_file():
        yield Problem((("data", "name"),), f"no such file: {root / name}")


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _teacher(teacher: Teacher, at: Key, plugins: bool) -> Iterator[Problem]:
    for key in ("weights", "recipe"):
        path = getattr(teacher, key)
        if path is not None and not Path(path).is_file():
            yield Problem(((*at, key),), f"no such file: {path}")
    name = teacher.model
    if name is None or name == FROM_PYTHON:
        return
    address = parse(name)
    match address.scheme:
        case "local-dir" if not (Path(address.name) / "config.json").is_file():
            yield Problem(((*at, "model"),), f"no model of timm's layout there (no config.json): {address.name}")
        case "torchvision":
            yield from _unknown(address.name, torchvision_models(), (*at, "model"))
        case "timm" if not plugins:
            yield from _unknown(address.name, [*ZOO, *timm_models(), *old_timm_models()], (*at, "model"))


def _unknown(name: str, known: Iterable[str], at: Key) -> Iterator[Problem]:
    """A problem unless `name`, without timm's tag after the dot, is known."""
    names = set(known)
    plain = name.partition(".")[0].removeprefix("timm/").lower() if at[-1] in ("model", "source") else name
    if not names or plain in names or name in names:
        return
    near = difflib.get_close_matches(plain, sorted(names), n=SUGGESTED, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(repr(one) for one in near)}?" if near else "see `distill teachers` and timm's list"
    )
    yield Problem((at,), f"nothing is called '{name}'; {hint}")
