"""How it was made: recipes, what differs between them, teacher, data, versions, machine, commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

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
    recipes = {name: dict(_flat(run.recipe)) for name, run in comparison.runs.items() if run.recipe}
    if len(recipes) > 1:
        keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
        differ = [key for key in keys if len({recipe.get(key, "") for recipe in recipes.values()}) > 1]
        caption = "What differs between the recipes." if differ else "The recipes are the same."
        values = {name: {key: recipe.get(key, "") for key in differ} for name, recipe in recipes.items()}
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
    header = ["", *(facts if len(facts) > 1 else ["this run"])]
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


def _flat(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
