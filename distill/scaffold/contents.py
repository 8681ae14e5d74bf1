"""The two recipes that `distill init` writes, as plain data by the rules, and as commented YAML. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from distill.recipe.imbalance import is_unbalanced
from distill.scaffold import rules
from distill.scaffold.rules import Goal, Images

AS_BLOCKS = ("data", "teacher", "student")
"""Sections with a line for each key; others are one line."""


class Wanted(NamedTuple):
    """What the recipes depend on, besides the teacher."""

    root: str
    images: Images
    goal: Goal
    gpu: bool
    precision: str
    skip_unreadable: bool
    channels: int | None = None
    """1: of colour images too, for a teacher that takes no others."""


def student_recipe(wanted: Wanted, teacher: Mapping[str, Any], *, logits: bool, maps: bool) -> dict[str, Any]:
    """The recipe of the student.

    Args:
        teacher: its section.
        logits, maps: whether it has them.
    """
    images, goal, gpu = wanted.images, wanted.goal, wanted.gpu
    resolution, patch = rules.resolution_and_patch(images.side, goal, gpu=gpu)
    train = rules.trained_on(images)
    epochs = rules.epochs(train, goal, gpu=gpu)
    strong = epochs * train > rules.SMALL_BUDGET
    distill = rules.methods(logits=logits, maps=maps)
    student = {
        "model": rules.student(train, goal, gpu=gpu),
        "patch_size": patch,
        "stem": "conv",
        "attention": {"kind": "area", "max_area": 2, "blocks": [0, 1]},
        "distillation_token": True,
    }
    return {
        "data": _data(wanted, resolution, epochs * train, epochs),
        "teacher": dict(teacher),
        "student": student | ({"drop_path": 0.1} if strong else {}),
        "label_weight": 0.5 if logits else 1.0,
        "distill": distill,
        "optim": rules.optimizer(epochs * train, epochs),
        "train": _train(wanted, train, epochs),
        "control": False,
    }


def teacher_recipe(wanted: Wanted) -> dict[str, Any]:
    """The recipe of a CNN that is trained first, on what the student gets."""
    images, goal, gpu = wanted.images, wanted.goal, wanted.gpu
    resolution, _ = rules.resolution_and_patch(images.side, goal, gpu=gpu)
    train = rules.trained_on(images)
    epochs = rules.epochs(train, goal, gpu=gpu)
    return {
        "data": _data(wanted, resolution, min(epochs * train, rules.SMALL_BUDGET), epochs),
        "student": {"model": rules.teacher(resolution)},
        "optim": rules.optimizer(min(epochs * train, rules.SMALL_BUDGET), epochs),
        "train": _train(wanted, train, epochs),
    }


def _data(wanted: Wanted, resolution: int, seen: int, epochs: int) -> dict[str, Any]:
    images = wanted.images
    content: dict[str, Any] = {"name": "folder", "root": wanted.root, **rules.holdouts(images)}
    content["resolution"] = resolution
    if (fit := rules.fit(images.stretch)) != "crop":  # the default
        content["fit"] = fit
    if wanted.channels is not None:
        content["channels"] = wanted.channels
    if wanted.skip_unreadable:
        content["skip_unreadable"] = True
    if is_unbalanced(list(images.counts.values())):
        content["class_weights"] = None  # for its comment: what counts, the images or the classes, nobody else knows
    return content | {"augment": rules.augmentation(resolution, grey=images.grey, seen=seen, epochs=epochs)}


def _train(wanted: Wanted, images: int, epochs: int) -> dict[str, Any]:
    batch = rules.batch_size(images, gpu=wanted.gpu)
    return {
        "epochs": epochs,
        "batch_size": batch,
        "precision": wanted.precision,
        "ema": rules.ema(images // batch * epochs),
    }


def written(content: Mapping[str, Any], header: Sequence[str], comments: Mapping[str, str]) -> str:
    """A recipe as YAML.

    Args:
        header: lines of the comment at its top.
        comments: by dotted key, at the end of its line.
    """
    lines = [f"# {_printable(line)}".rstrip() for line in header]
    for key, value in content.items():
        if key in AS_BLOCKS or isinstance(value, list):
            lines.append(_commented(f"{key}:", comments.get(key)))
            lines += _under(key, value, comments)
        else:
            lines.append(_commented(_flow({key: value}), comments.get(key)))
    return "\n".join(lines) + "\n"


def _under(key: str, value: Any, comments: Mapping[str, str]) -> Iterator[str]:
    if isinstance(value, list):
        yield from (f"  - {_flow([one])}" for one in value)
    else:
        for inner, content in value.items():
            yield _commented(f"  {_flow({inner: content})}", comments.get(f"{key}.{inner}"))


def _flow(value: dict[str, Any] | list[Any]) -> str:
    """One line of YAML, without the outermost brackets."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text.strip()[1:-1]


def _commented(line: str, comment: str | None) -> str:
    return f"{line:<29} # {_printable(comment)}" if comment else line


def _printable(text: str) -> str:
    """In one line: names of folders may hold anything."""
    return text if text.isprintable() else ascii(text)[1:-1]
