"""Which networks compared runs have, and what each of them costs: a network has one speed, whoever trained it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill.report.runs import Record, RunFiles

TRAINED_ONLY = ("weights", "pretrained", "init", "drop_path")
"""Keys of a recipe's student that change its training, and not the network that answers."""
TRAINED = re.compile(r"^local-dir:|(-[0-9a-f]{12})?/export/?$")
"""What a folder's name is without: the prefix, and the end of an export, with a digest if a recipe trained it."""
TOGETHER = "together"


class Measurement(NamedTuple):
    """Costs of networks that took turns on one machine."""

    where: str
    """`TOGETHER` of all that are compared, or the name of the run at whose end it was."""
    machine: str
    costs: Mapping[str, Record]
    """By network, as `Costs` in `analysis.json`."""


def on_threads(machine: str, threads: int | None) -> str:
    """'AMD EPYC, 2 threads'; `threads`: None where they are not known, or do not matter."""
    return f"{machine}, {threads} thread{'s' if threads != 1 else ''}" if threads else machine


def student_name(run: RunFiles) -> str | None:
    """The model of the recipe's student; None where it is not known."""
    return (run.recipe.get("student") or {}).get("model")


def teacher_name(run: RunFiles) -> str | None:
    """The teacher as its preflight called it, or the recipe does; None without one. One in a folder has the folder's
    name, and one that was trained first its recipe's.
    """
    if (described := _preflight(run).get("teacher")) is not None:
        called = str(described).partition(": ")[0]
        return TRAINED.sub("", called).rpartition("/")[2] if called.startswith("local-dir:") else called
    sections = run.recipe.get("teacher")
    names = [
        name
        for section in (sections if isinstance(sections, list) else [sections or {}])
        if (name := section.get("model") or section.get("recipe") or ("moving average" if section.get("ema") else None))
    ]
    return " + ".join(names) or None


def student_network(run: RunFiles) -> str:
    """Equal for runs whose students compute the same with other weights: by the exported architecture, else by the
    recipe, else by the run itself.
    """
    config, recipe = run.config, run.recipe if run.known_recipe is None else run.known_recipe.model_dump(mode="json")
    if config.get("architecture"):
        size = (config.get("pretrained_cfg") or {}).get("input_size")
        return _key("student", config["architecture"], config.get("model_args"), size)
    if (student := recipe.get("student")) is None:
        return _key("student of", str(run.path))
    options = {key: value for key, value in student.items() if key not in TRAINED_ONLY and value is not None}
    classes = next(iter(run.predictions.logits.values())).shape[1]
    return _key("student", options, (recipe.get("data") or {}).get("resolution"), classes)


def teacher_network(run: RunFiles) -> str:
    """The same of its teacher: by what its preflight said, else by the run itself."""
    if (described := _preflight(run).get("teacher")) is not None:
        return _key("teacher", str(described).partition(", weights ")[0])
    return _key("teacher of", str(run.path))


def measurements(runs: Mapping[str, RunFiles]) -> list[Measurement]:
    """Of the ends of these runs."""
    found = []
    for name, run in runs.items():
        if run.analysis is not None:
            costs = {student_network(run): run.costs("student")}
            if teacher := run.costs("teacher"):
                costs[teacher_network(run)] = teacher
            known = run.analysis.values.get("machine") or run.environment.get("device_name")
            found.append(Measurement(name, str(known or run.analysis.values["device"]), costs))
    return found


def measurement_of(found: Sequence[Measurement], *networks: str) -> Measurement | None:
    """The first one of all these networks."""
    return next((each for each in found if all(network in each.costs for network in networks)), None)


def _preflight(run: RunFiles) -> Record:
    return next((event for event in run.events if event.get("event") == "preflight"), {})


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)
