"""The top of a report: what was asked, the verdict, four tiles for each student, date, data and machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from distill.report.comparison import Comparison
from distill.report.networks import TOGETHER, on_threads
from distill.report.page import Cell, Table
from distill.report.roles import STUDENT
from distill.report.runs import RunFiles
from distill.report.standing import Difference, Standing, standings
from distill.report.verdict import sentence, times, verdict

MOST_SHOWN = 4
"""Students with tiles: as many as fit on a page."""


class Tile(NamedTuple):
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Summary:
    title: str
    """Names of the recipes."""
    asked: str
    verdict: str
    students: Sequence[tuple[Standing, str, Sequence[Tile]]]
    """The most accurate first, each with its sentence and four tiles."""
    left_out: int
    """Students without tiles."""
    facts: Mapping[str, str]
    """'date', 'data', 'machine', as far as they are known."""

    def record(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "title": self.title,
            "asked": self.asked,
            "verdict": self.verdict,
            "facts": dict(self.facts),
            "students": [
                {"name": student.called, "sentence": told, "tiles": [tile._asdict() for tile in tiles]}
                for student, told, tiles in self.students
            ],
        }

    def table(self) -> Table:
        """The tiles, a line for each student."""
        first = self.students[0][2]
        rows = [
            [
                Cell(student.called),
                *(Cell(f"{tile.value} ({tile.note})" if tile.note else tile.value) for tile in tiles),
            ]
            for student, _, tiles in self.students
        ]
        header = ["student", *(tile.name for tile in first)]
        return Table("tiles", "", header, rows, text_columns=len(header))


def summarise(comparison: Comparison) -> Summary:
    found = standings(comparison)
    shown = [(student, sentence(student), tiles(student)) for student in found[:MOST_SHOWN]]
    return Summary(
        title=title_of(comparison),
        asked=_asked(comparison, found),
        verdict=verdict(found),
        students=shown,
        left_out=len(found) - len(shown),
        facts=dict(_facts(comparison)),
    )


def title_of(comparison: Comparison) -> str:
    """Names of the students' recipes, or of runs whose recipes are not known; without any, of all."""
    names = {name: str(run.recipe.get("name") or name) for name, run in comparison.runs.items()}
    students = [names[name] for name, role in comparison.roles.items() if role == STUDENT]
    return ", ".join(dict.fromkeys(students or names.values()))


def tiles(student: Standing) -> list[Tile]:
    """Accuracy, gain over the control, size and latency."""
    low, high = student.interval
    note = f"95 % interval {low:.2f} to {high:.2f}"
    if student.against_teacher is not None:
        note += f"; teacher {student.against_teacher.other:.2f} %"
    ratios = {key: f"{times(ratio)} its teacher's" for key, ratio in student.ratios.items()}
    size = "" if student.parameters is None else f"{student.parameters:,} parameters"
    value = size or "not known"
    if student.megabytes is not None:
        value = f"{student.megabytes:.2f} MB"
    else:
        size = ""
    size = ", ".join(filter(None, (size, ratios.get("parameters"))))
    latency = Tile("latency", "not measured", "")
    if student.latency_ms is not None:
        on = ", ".join(filter(None, (f"one image on {student.machine}", ratios.get("latency_ms"))))
        latency = Tile("latency", f"{student.latency_ms:.2f} ms", on)
    kind = "k-NN accuracy" if student.by_neighbours else "accuracy"
    return [
        Tile(kind, f"{student.top1:.2f} %", note),
        _gain(student.against_control),
        Tile("size", value, size),
        latency,
    ]


def _gain(difference: Difference | None) -> Tile:
    if difference is None:
        return Tile(
            "gain over control", "not known", "there is no control: the same network, trained without a teacher"
        )
    note = {"better": "a gain", "worse": "a loss", "equal": "equal within a point", "open": "no difference shown"}
    told = f"{note[difference.shown]}; {difference.words}; control {difference.other:.2f} %"
    return Tile("gain over control", f"{difference.points:+.2f} points", told)


def _asked(comparison: Comparison, found: Sequence[Standing]) -> str:
    if found[0].role != STUDENT:
        return f"How good is {', '.join(student.called for student in found)}?"
    whose = [_described(comparison.runs[student.name], student) for student in found[:MOST_SHOWN]]
    which = f"{'; '.join(whose)}{f'; and {len(found) - MOST_SHOWN} more' if len(found) > MOST_SHOWN else ''}"
    teachers = dict.fromkeys(student.its_teacher for student in found if student.against_teacher is not None)
    if not teachers:
        return f"What did distillation give the student? {which}."
    return f"Can the student take the place of {' or '.join(teachers)}, and did the teacher help it? {which}."


def _described(run: RunFiles, student: Standing) -> str:
    """'nano: vit_nano by hard and guide in 6 epochs'."""
    methods = [str(section.get("method")) for section in run.recipe.get("distill") or []]
    epochs = (run.recipe.get("train") or {}).get("epochs")
    words = [student.network or "a student"]
    words += [f"by {' and '.join(methods)}"] if methods else []
    words += [f"in {epochs} epochs"] if epochs else []
    return f"{student.called}: {' '.join(words)}"


def _facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    runs = list(comparison.runs.values())
    ends = sorted(end for run in runs if (end := max((event.get("time") or 0 for event in run.events), default=0)))
    dates = list(dict.fromkeys(f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d}" for end in ends))
    if dates:
        yield "date", f"trained {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    yield "data", ", ".join(filter(None, (_data_name(runs[0]), _sizes(comparison))))
    machines = list(dict.fromkeys(filter(None, map(_machine, runs))))
    if machines:
        yield "machine", "; ".join(machines)
    speeds = list(dict.fromkeys(m.machine for m in comparison.measured if m.where == TOGETHER))
    if speeds:
        yield "speeds", f"measured together on {speeds[0]}"


def _data_name(run: RunFiles) -> str | None:
    data = run.recipe.get("data") or {}
    name = str(data.get("name") or "")
    return Path(str(data.get("root"))).name if name == "folder" and data.get("root") else name or None


def _sizes(comparison: Comparison) -> str:
    run = next(iter(comparison.runs.values()))
    sizes = {name: size for name, size in (run.status.get("data_sizes") or {}).items() if size and name != "test"}
    counted = [f"{size:,} {'training' if name == 'train' else name} images" for name, size in sizes.items()]
    return ", ".join([*counted, f"{comparison.samples:,} test images", f"{len(run.class_names)} classes"])


def _machine(run: RunFiles) -> str | None:
    environment = run.environment
    if not (name := environment.get("device_name") or environment.get("device")):
        return None
    processes, threads = environment.get("processes"), environment.get("threads")
    called = f"{name}, {processes} processes" if processes and processes > 1 else str(name)
    return on_threads(called, threads if environment.get("device") == "cpu" else None)
