"""`distill sweep`: runs a sweep from its file to its report."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from distill.console import console, say
from distill.errors import InputError, RunFailed
from distill.files.regular import regular
from distill.files.text import write_text
from distill.recipe import load, read_yaml
from distill.recipe.loading import Problem, listed
from distill.report.comparison import compare
from distill.report.document import write_report
from distill.report.sweep import ranking_table, render_sweep, summary, sweep_section
from distill.report.tables import render_console
from distill.sweeps.jobs import Executor, Processes, Submitit
from distill.sweeps.ranking import ranked, record
from distill.sweeps.scheduler import Scheduler
from distill.sweeps.schema import Sweep, check_sweep, read_sweep
from distill.sweeps.study import Study, quiet
from distill.validation import missing

BEGAN = "sweep.yaml"
RECIPE = "recipe.yaml"
JOBS = "jobs"
PILOT_MINUTES = 10.0
OF_TEACHERS = (
    "A teacher's own accuracy does not tell how much a student learns from it: a stronger one may be too far ahead of "
    "a small student, or too sure of its answers. Pilots are short: a longer run may order close ones differently."
)


def run_sweep(sweep: Sweep, out: Path) -> dict[str, Any]:
    """Run a sweep, or go on with it, under `out`; returns the content of its `sweep.json`.

    Raises:
        InputError: `out` cannot be used, is in use, or holds another sweep.
        Interrupted: by a signal; the same command goes on.
        RunFailed: no trial is complete, or the chosen one cannot be finished.
    """
    with _held(out), quiet():
        options = sweep.options
        executor: Executor
        if options.executor == "processes":
            executor = Processes(options.parallel, launched=options.command is not None)
        else:
            executor = Submitit(options.executor, options.parallel, out / JOBS, options.options)
        _begin(sweep, out)
        study = Study(sweep, out)
        scheduler = Scheduler(sweep, study, executor, out, out / RECIPE)
        with scheduler.listening():
            return _run(scheduler)


def _run(scheduler: Scheduler) -> dict[str, Any]:
    sweep, study, out = scheduler.sweep, scheduler.study, scheduler.folder
    scheduler.search()
    groups = ranked(study.trials())
    _write(record(sweep, study, out), out)
    if not groups:
        raise RunFailed(f"{out}: no trial is complete; {_first_failure(scheduler)}")
    if sweep.tested:
        say(f"testing {', '.join(trial.name for trial in groups[0])}, and the controls")
        scheduler.finish(groups[0])
    found = _write(record(sweep, study, out), out)
    console.print(render_sweep(found))
    say(f"{summary(found)}\n{ranking_table(found).caption}")
    if sweep.tested:
        comparison = compare([scheduler.path(trial) for trial in groups[0]])
        write_report(comparison, out / "report.html", [sweep_section(found)])
        console.print(render_console(comparison))
        say(f"report   {out / 'report.html'}")
    say(f"sweep    {out / 'sweep.json'}")
    return found


def _write(found: dict[str, Any], out: Path) -> dict[str, Any]:
    if "teacher" in found["keys"]:
        found["told"].append(_of_teachers(found))
    write_text(out / "sweep.json", json.dumps(found, indent=1) + "\n")
    return found


def planned(
    target: str | PathLike[str] | Mapping[str, Any],
    seeds: int | None,
    teachers: Sequence[str] | None,
    minutes: float | None,
    overrides: Sequence[str],
    *,
    max_trials: int,
    plugins: Sequence[str],
) -> Sweep:
    """The checked sweep of a file or a mapping; with seeds or teachers, of a recipe; see `distill.sweep`.

    Raises:
        InputError: lists all of its problems.
    """
    if minutes is not None and (teachers is None or minutes <= 0):
        raise InputError("--minutes: how long each pilot of --teachers trains; above 0, and only with them.")
    if seeds is not None and teachers is not None:
        raise InputError("--seeds, --teachers: give one of them, or a sweep file with both as its keys.")
    limits: dict[str, Any] = {"max_trials": max_trials, "plugins": plugins}
    if seeds is None and teachers is None:
        if isinstance(target, Mapping):
            return check_sweep(target, overrides, source="sweep", **limits)
        return read_sweep(Path(target), overrides, **limits)
    if isinstance(target, Mapping):
        raise InputError("--seeds, --teachers: they vary a recipe; give the path of its file.")
    if teachers is not None:
        return pilots(Path(target), teachers, overrides, minutes or PILOT_MINUTES, **limits)
    assert seeds is not None
    return seeds_of(Path(target), seeds, overrides, **limits)


def pilots(
    recipe: Path,
    teachers: Sequence[str],
    overrides: Sequence[str],
    minutes: float,
    *,
    max_trials: int,
    plugins: Sequence[str],
) -> Sweep:
    """A sweep of short, equally long runs of a recipe under each of several teachers: names, or recipes of theirs.

    Raises:
        InputError: a teacher is given twice, or the recipe or one of its variants is invalid.
    """
    base = load(recipe, overrides)
    known: dict[str, Any] = {}
    if base.teachers:
        known = base.teachers[0].model_dump(mode="json", exclude_unset=True)
    kept = {key: value for key, value in known.items() if key in ("min_accuracy", "cache", "ema")}
    candidates = []
    for name in teachers:
        key = "recipe" if Path(name).suffix in (".yaml", ".yml") else "model"
        candidates.append(known if known.get(key) == name else {key: name, **kept})
    given = {"base": str(recipe), "keys": {"teacher": candidates}, "minutes": minutes}
    source = f"--teachers {','.join(teachers)}"
    return check_sweep(given, overrides, source=source, max_trials=max_trials, plugins=plugins)


def seeds_of(recipe: Path, count: int, overrides: Sequence[str], *, max_trials: int, plugins: Sequence[str]) -> Sweep:
    """A sweep of one recipe under so many seeds, from its own on.

    Raises:
        InputError: the recipe is invalid, or there are too many.
    """
    first = load(recipe, overrides).seed
    given = {"base": str(recipe), "keys": {"seed": list(range(first, first + count))}}
    return check_sweep(given, overrides, source=f"--seeds {count}", max_trials=max_trials, plugins=plugins)


def _of_teachers(found: Mapping[str, Any]) -> str:
    """What the pilots say of teachers, in words, with the correlation where there are three or more."""
    own = {trial["number"]: trial["teacher"] for trial in found["trials"]}
    pairs = [(own[rank["trials"][0]], rank["mean"]) for rank in found["ranking"]]
    known = [(teacher, mean) for teacher, mean in pairs if teacher is not None]
    if len(known) < 3 or any(len(set(column)) < 2 for column in zip(*known, strict=True)):
        return OF_TEACHERS
    correlation = float(stats.spearmanr(*zip(*known, strict=True)).statistic)
    return f"{OF_TEACHERS} Here the rank correlation of teachers' and students' accuracies is {correlation:+.2f}."


def _first_failure(scheduler: Scheduler) -> str:
    for trial in scheduler.study.trials():
        if trial.state == "fail":
            return f"{trial.name}: {trial.note}. See {scheduler.log(trial)}"
    return "all were stopped early; give stop.min_epochs, or more trials"


def _begin(sweep: Sweep, out: Path) -> None:
    """Write what the sweep is, once; a sweep that goes on must be the same."""
    began, identity = out / BEGAN, sweep.identity()
    if not began.exists():
        text = yaml.safe_dump(dict(sweep.recipe), sort_keys=False, allow_unicode=True)
        foreign = sorted(path.name for path in out.iterdir() if path.name not in (".lock", RECIPE, JOBS))
        if (out / RECIPE).exists() and (out / RECIPE).read_bytes() != text.encode():  # not of a killed beginning
            foreign.append(RECIPE)
        if foreign:
            raise InputError(f"{out}: exists and is no sweep (it has {foreign[0]}). Choose another --out.")
        absent = [
            Problem.of(found) for recipe in sweep.samples for found in missing(recipe, plugins=bool(sweep.plugins))
        ]
        if absent:
            raise InputError(listed(absent, sweep.source, "sweep"))
        write_text(out / RECIPE, text)
        write_text(began, identity)
        return
    if (before := began.read_text(encoding="utf-8")) != identity:
        changed = _changed(read_yaml(before, source=str(began)), read_yaml(identity, source=sweep.source))
        raise InputError(
            f"{out}: {sweep.source} has changed since this sweep began: {', '.join(changed)}. Go on with it as it was, "
            "or choose another --out. Only parallel, executor, options and command may change."
        )


def _changed(before: Any, after: Any) -> list[str]:
    if not isinstance(before, dict):
        return ["all"]
    return [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)] or [
        "the order of keys"
    ]


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Create the folder and lock it; the kernel releases the lock when its holder dies."""
    try:
        created = not out.exists()
        before = {name for name in (RECIPE, ".lock") if (out / name).exists()}
        out.mkdir(parents=True, exist_ok=True)
        lock = regular(str(out / ".lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}. Choose another --out.") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"{out}: another sweep runs there. Wait for it, or choose another --out.") from None
    try:
        yield
    except InputError:
        if not (out / BEGAN).exists():  # nothing half-written is left
            for name in {RECIPE, ".lock"} - before:
                (out / name).unlink(missing_ok=True)
            for folder in (out / JOBS, *([out] if created else [])):
                with suppress(OSError):
                    folder.rmdir()
        raise
    finally:
        os.close(lock)
