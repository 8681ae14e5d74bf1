"""How it was made: recipes, what differs between them, teacher, data, versions, machine, commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from distill.commandline import recorded_command
from distill.report.comparison import Comparison
from distill.report.page import Cell, Listing, Part, Section, Table
from distill.report.runs import Record, RunFiles


def build(comparison: Comparison) -> Section | None:
    facts = {name: dict(_facts(run)) for name, run in comparison.runs.items()}
    parts: list[Part] = []
    if any(facts.values()):
        parts.append(_by_run("made", "What the figures depend on.", facts))
    recipes = {name: _complete(run) for name, run in comparison.runs.items() if run.recipe}
    if len(recipes) > 1:
        differ = list(_differences(list(recipes.values())))
        caption = "What differs between the recipes." if differ else "The recipes are the same."
        values = {name: {key: shown[index] for key, shown in differ} for index, name in enumerate(recipes)}
        parts.append(_by_run("differences", caption, values))
    for name, run in comparison.runs.items():
        of = f" of {name}" if comparison.several else ""
        if run.recipe:
            parts.append(Listing(f"Resolved recipe{of}", yaml.safe_dump(dict(run.recipe), sort_keys=False)))
        if run.environment:
            parts.append(Listing(f"Environment{of}", json.dumps(run.environment, indent=2)))
    if not parts:
        return None
    commands = [text for values in facts.values() if (text := values.get("command"))]
    says = f"{'These commands make' if len(commands) > 1 else 'This command makes'} it again: {'; '.join(commands)}"
    return Section("made", "How it was made", says if commands else "Where the figures come from.", parts, facts)


def _by_run(name: str, caption: str, facts: Mapping[str, Mapping[str, str]]) -> Table:
    """A line for each fact, a column for each run."""
    keys = dict.fromkeys(key for values in facts.values() for key in values)
    rows = [[Cell(key), *(Cell(values.get(key, "")) for values in facts.values())] for key in keys]
    header = ["key", *(facts if len(facts) > 1 else ["this run"])]
    return Table(name, caption, header, rows, text_columns=len(header))


def _facts(run: RunFiles) -> Iterator[tuple[str, str]]:
    environment = run.environment
    if command := environment.get("command"):
        yield "command", recorded_command(command)
    preflight = next((event for event in run.events if event.get("event") == "preflight"), None)
    if preflight is not None:
        if "teacher" in preflight:
            yield "teacher and its inputs", str(preflight["teacher"])
        if "teacher_sha256" in preflight:
            yield "teacher's weights, SHA-256", str(preflight["teacher_sha256"])
        for key, name in (("teacher_license", "teacher's licence"), ("base_model", "teacher's weights are those of")):
            if key in preflight:
                yield name, str(preflight[key])
        if isinstance(top1 := preflight.get("teacher/top1"), int | float):
            where = f" on {preflight['samples']:,} {preflight.get('split')} images" if preflight.get("samples") else ""
            yield "preflight", f"{top1:.2f} %{where}"
    images = run.status.get("training_images") or {}
    if images.get("unlabelled"):
        yield "training images", ", ".join(f"{number:,} {kind}" for kind, number in images.items())
    if run.data_digest is not None:
        yield "data, SHA-256", run.data_digest
    if digest := run.status.get("unlabelled_digest"):
        yield "unlabelled images, SHA-256", digest
    exported = run.status.get("exported")
    if exported is not None:
        yield "exported weights", f"{exported['weights']}, step {exported['step']}"
    if versions := environment.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    for key, name in (("python", "Python"), ("commit", "commit"), ("platform", "system")):
        if environment.get(key):
            yield name, str(environment[key])
    if environment.get("device_name"):
        also = [f"{environment[key]} {key}" for key in ("processes", "threads") if environment.get(key)]
        words = [str(environment["device_name"]), *also, f"precision {environment.get('precision')}"]
        yield "machine", ", ".join(words)


def _complete(run: RunFiles) -> Record:
    """The recipe with what an earlier version did not write, as far as it is known: defaults."""
    return run.recipe if run.known_recipe is None else run.known_recipe.model_dump(mode="json")


def _differences(recipes: Sequence[Record], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys of different values, and these as text, '' where there is none; a key that one recipe leaves out is
    no difference, unless it says null elsewhere what others set.
    """
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [recipe[key] for recipe in recipes if key in recipe]
        if all(isinstance(value, dict) for value in values) and len(values) == len(recipes):
            yield from _differences(values, f"{prefix}{key}.")
        elif any(value != values[0] for value in values[1:]):
            yield f"{prefix}{key}", [_short(recipe.get(key)) for recipe in recipes]


def _short(value: Any) -> str:
    """As JSON, without what is null in a mapping."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return "" if value is None else json.dumps(value, ensure_ascii=False)
