"""Writes the recipes of `distill init`."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill.cores import cores
from distill.errors import InputError
from distill.files.text import write_text
from distill.launching.processes import set_threads, start_processes
from distill.recipe import from_mapping, read_yaml
from distill.scaffold import contents, rules
from distill.scaffold.estimate import Estimate, estimate
from distill.scaffold.folder import Found, look_at, open_sample
from distill.scaffold.rules import GOALS, Goal
from distill.scaffold.teacher import Chosen, check_teacher, of_spec, trained_first


class Begun(NamedTuple):
    """What was written, and what to say about it."""

    recipe: Path
    facts: list[tuple[str, str]]
    """Keys and values, one a line."""
    warnings: list[str]
    command: str
    """The next one."""


def begin(root: Path, teacher: str | None, goal: Goal, out: Path | None) -> Begun:
    """Write a recipe for the images in the folder `root`, and one for its teacher unless there is one.

    Raises:
        InputError: folder, teacher or goal cannot be used, or a file is in the way; nothing is written then.
    """
    if goal not in GOALS:
        raise InputError(f"--goal: one of {', '.join(GOALS)}, got '{goal}'.")
    recipe = out or Path(f"{re.sub(r'[^A-Za-z0-9._-]', '-', root.resolve().name).lstrip('.-') or 'recipe'}.yaml")
    trained = recipe.with_name(f"{recipe.stem}-teacher{recipe.suffix}")
    _check_free([recipe] if teacher else [recipe, trained])
    found = look_at(root)
    rules.holdouts(found.images)
    given = None if teacher is None else check_teacher(teacher, found.folder.class_names)
    device = start_processes().device
    set_threads(None)
    gpu = device.type == "cuda"
    one_channel = given is not None and given[0].mean is not None and not found.images.grey
    channels = 1 if one_channel else None
    wanted = contents.Wanted(str(root), found.images, goal, gpu, _precision(gpu), bool(found.left_out), channels)
    resolution, _ = rules.resolution_and_patch(found.images.side, goal, gpu=gpu)
    with tempfile.TemporaryDirectory() as cache:
        data = from_mapping({"data": contents.student_recipe(wanted, {}, logits=True, maps=True)["data"]}).data
        sample = open_sample(found, data, device, Path(cache))
        found = found._replace(left_out=(*found.left_out, *sample.info.left_out))
        wanted = wanted._replace(skip_unreadable=bool(found.left_out))
        first = contents.teacher_recipe(wanted) if given is None else None
        if given is None:
            chosen = trained_first(rules.teacher(resolution), sample, resolution, trained)
        else:
            chosen = of_spec(*given, sample, resolution, device)
        content = contents.student_recipe(wanted, chosen.section, logits=chosen.logits, maps=chosen.maps)
        size = {"images": rules.trained_on(found.images), "evaluated": _evaluated(found)}
        costs = {
            path: estimate(from_mapping(one), sample, its_teacher, **size)
            for path, one, its_teacher in ((trained, first, None), (recipe, content, chosen.teacher.to(device)))
            if one is not None
        }
    machine = torch.cuda.get_device_name(device) if gpu else f"{cores()} CPU core(s)"
    command = f"{_launch(gpu)} {shlex.quote(str(recipe))}"
    texts = {recipe: _student_text(content, found, chosen, goal, machine, costs, command)}
    if first is not None:
        texts[trained] = _teacher_text(first, found, machine, costs[trained], trained)
    for path, text in texts.items():
        from_mapping(read_yaml(text, source=str(path)), source=str(path))
    _write(texts)
    facts = [
        *found.lines(),
        ("teacher", chosen.said),
        ("student", _student(content)),
        ("estimate", f"{_total(costs)} on {machine}"),
        ("written", ", ".join(map(str, texts))),
    ]
    warnings = [chosen.warning] if chosen.warning else []
    if found.left_out:
        warnings.append(f"files that are no images or cannot be read will be skipped, such as {found.left_out[0]}")
    return Begun(recipe, facts, warnings, command)


def _check_free(paths: Sequence[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise InputError(f"{path}: is there already and is not overwritten. Name another: --out RECIPE.yaml.")
        if path.suffix not in (".yaml", ".yml"):
            raise InputError(f"--out: {path} is no recipe's name. Let it end in .yaml.")
        if not path.parent.is_dir():
            raise InputError(f"--out: no such folder: {path.parent}. Make it first.")


def _write(texts: Mapping[Path, str]) -> None:
    """All or none."""
    try:
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        for path in texts:
            path.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error}). Name another: --out.") from None


def _precision(gpu: bool) -> str:
    if gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def _launch(gpu: bool) -> str:
    if gpu and (number := torch.cuda.device_count()) > 1:
        return f"accelerate launch --multi_gpu --num_processes {number} -m distill.train"
    return "distill train"


def _evaluated(found: Found) -> int:
    """Images of the validation split."""
    if found.images.validation is not None:
        return found.images.validation
    return round(found.images.train * rules.holdouts(found.images)["validation"])


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def _student(content: dict[str, Any]) -> str:
    student, data = content["student"], content["data"]
    grid = data["resolution"] // student["patch_size"]
    return (
        f"{student['model']} on {grid}x{grid} patches of {student['patch_size']} at {data['resolution']} px, "
        f"{content['train']['epochs']} epochs"
    )


def _time(minutes: float) -> str:
    if minutes < 1:
        return "under 1 min"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _total(costs: dict[Path, Estimate]) -> str:
    parts = [cost.minutes for cost in costs.values()]
    of_each = f" (teacher {_time(parts[0])}, student {_time(parts[1])})" if len(parts) > 1 else ""
    return f"{_time(sum(parts))}{of_each}, {max(cost.mebibytes for cost in costs.values()):,.0f} MiB"


def _student_text(
    content: dict[str, Any],
    found: Found,
    chosen: Chosen,
    goal: Goal,
    machine: str,
    costs: dict[Path, Estimate],
    command: str,
) -> str:
    steps = min(cost.steps for cost in costs.values())
    images, counts = found.images, found.images.counts.values()
    header = [
        f"A student for the images in {found.folder.root}; goal: {goal}. Written by `distill init`,",
        "whose rules are in docs/reference/init.md; `distill schema` has all keys.",
        f"Estimate, from {_steps(steps)} on {machine}: {_total(costs)}.",
        "",
        f"  {command}",
    ]
    comments = {
        "data.root": f"{len(counts)} classes, {min(counts):,} to {max(counts):,} training images each",
        "data.class_weights": "balanced: rare classes count as much as frequent ones (docs/how-to/unbalanced.md)",
        "data.test": "held out, for want of a test folder",
        "data.validation": "held out, for want of a val folder: weights are chosen on these",
        "data.resolution": f"of the images' shorter sides the median is {images.side} px",
        "data.channels": "the teacher takes greyscale images",
        "data.skip_unreadable": "some files are no images",
        "teacher": chosen.note,
        "student.patch_size": _student(content).split(" on ")[1].partition(" of ")[0],
        "student.attention": "kind: standard is that of timm",
        "distill": "guide: feature maps, which gained most in results/README.md",
        "train": "bf16: on a CPU without it, fp32",
        "control": "true: also train the same student without the teacher",
    }
    return contents.written(content, header, comments)


def _teacher_text(content: dict[str, Any], found: Found, machine: str, cost: Estimate, path: Path) -> str:
    header = [
        f"A teacher for the images in {found.folder.root}: trained once, before the student of",
        f"{path.stem.removesuffix('-teacher')}{path.suffix}, which names it. Written by `distill init`.",
        f"Estimate, from {_steps(cost.steps)} on {machine}: {_time(cost.minutes)}, {cost.mebibytes:,.0f} MiB.",
    ]
    pretrained = "pretrained: true, below, begins with timm's weights, which are downloaded"
    # timm has none of this project's own CNNs.
    comments = {"student.model": pretrained} if content["student"]["model"] == "resnet18" else {}
    return contents.written(content, header, comments)
