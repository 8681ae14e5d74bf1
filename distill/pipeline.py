"""A whole run: the teacher first where a recipe trains it, its preflight, the student, the control, the comparison."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from distill import checkpoint, registry, run
from distill.console import console, say, set_up_logging
from distill.data import Dataset, open_dataset
from distill.data.sequential import SequentialDataset
from distill.errors import InputError, RunFailed
from distill.launching.processes import (
    build_accelerator,
    join_processes,
    on_main,
    set_threads,
    start_processes,
    with_precision,
)
from distill.launching.signals import StopRequest, exit_cause
from distill.out_of_memory import advising
from distill.recipe import OPERATIONAL_KEYS, Recipe, load
from distill.run import Run
from distill.teaching.teachers import (
    build_teacher,
    is_trained,
    run_preflight,
    teacher_place,
    teacher_recipe,
    weights_digests,
)
from distill.tracking import Tracking
from distill.trainer import Trainer
from distill.training.finishing import describe_export
from teachers import Teacher

MOST_NAMED = 10
"""Files that are left out of the data, in status.json."""
_log = logging.getLogger("distill")


@dataclass(frozen=True)
class Place:
    """Where a run happens and from which checkpoint it continues, if from any."""

    directory: Path
    checkpoint: Path | None = None
    resumed: bool = False
    named: bool = False
    """Whether the user named this very checkpoint."""


@dataclass(frozen=True)
class Launch:
    """What all runs of one launch share."""

    stop: StopRequest
    threads: int
    runs: list[Run] = field(default_factory=list)
    """The one that was asked for, and within it those that have begun and not finished."""


def launch(
    path: Path, overrides: Sequence[str], runs: list[Run], *, out: Path | None, resume: str | None, dry_run: bool
) -> None:
    """Run the recipe at `path` on all processes of this launch, whose `StopRequest` is made before.

    Args:
        runs: gets the run that was asked for, and within it those that have begun and not finished.

    Raises:
        InputError: something the user gave cannot be used; nothing half-written is left.
        RunFailed: the run cannot go on.
        Interrupted: stopped early, resumable.
    """
    stop = StopRequest.current()
    stop.loaded()
    recipe = load(path, overrides)
    threads = set_threads()
    is_main = start_processes().is_main_process
    set_up_logging(is_main=is_main)
    join_processes(stop)
    try:
        recipe = with_precision(recipe)
        if dry_run:
            from distill.dry_run import dry_run_recipe

            dry_run_recipe(recipe, build_accelerator(recipe.train, Path()))
            stop.finish()
            return
        place = on_main(lambda: locate(recipe, out, resume))
        stop.limit(recipe.train.max_minutes)
        execute(recipe, place, Launch(stop, threads, runs), source=path)
        stop.finish()
        if is_main:
            show_result(place.directory)
    except BaseException as error:
        cause = stop.exit_cause(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def locate(recipe: Recipe, out: Path | None, resume: str | None) -> Place:
    """The run directory, and the checkpoint to continue from.

    Raises:
        InputError: the directory is taken, finished, in use or of another recipe, or there is nothing to resume at that
        path.
    """
    if resume is None:
        directory = out or run.new_path(recipe)
        run.check_new(directory)
        return Place(directory)
    if resume == "auto":
        directory = out or run.newest_unfinished(recipe) or run.new_path(recipe)
        if not run.read_status(directory):
            run.check_new(directory)
    else:
        target = Path(resume).resolve()
        is_checkpoint = target.parent.name == "checkpoints"
        directory = target.parent.parent if is_checkpoint else target
        if not target.is_dir() or not run.read_status(directory):
            raise InputError(f"--resume {resume}: neither a run directory nor a checkpoint in one.")
        if out is not None and out.resolve() != directory:
            raise InputError(f"--out {out}: a resumed run stays in its directory, {directory}. Leave --out away.")
        if is_checkpoint:
            run.check_resumable(directory, recipe)
            checkpoint.verify(target)
            return Place(directory, target, resumed=True, named=True)
    return newest_place(directory, recipe)


def newest_place(directory: Path, recipe: Recipe) -> Place:
    """A run at `directory`, continued where it stopped, or from its beginning where there is none yet.

    Raises:
        InputError: it cannot be continued.
    """
    if not run.read_status(directory):
        return Place(directory)
    run.check_resumable(directory, recipe)
    return Place(directory, checkpoint.newest_intact(directory / "checkpoints"), resumed=True)


def execute(
    recipe: Recipe, place: Place, shared: Launch, *, source: Path | None = None, dataset: Dataset | None = None
) -> None:
    """One run, from wherever it stands to `finished`; its teacher's and its control's run within."""
    directory = Run(place.directory, is_main=PartialState().is_main_process)
    on_main(directory.claim)
    shared.runs.append(directory)
    try:
        _execute(recipe, place, shared, directory, source=source, dataset=dataset)
        directory.status("finished")
        if shared.runs[0] is not directory:
            shared.runs.remove(directory)
    except BaseException as error:
        cause = exit_cause(error)
        directory.end(cause)
        if cause is error:
            raise
        raise cause from error
    finally:
        directory.close()


def _execute(
    recipe: Recipe, place: Place, shared: Launch, directory: Run, *, source: Path | None, dataset: Dataset | None
) -> None:
    accelerator = build_accelerator(recipe.train, place.directory)
    if dataset is None:
        dataset = open_data(recipe, accelerator)
    check_data(place, dataset)
    if not on_main(lambda: all(is_trained(recipe, spec) for spec in recipe.teachers)):
        # What is wrong with the student shows before its teacher is trained.
        Trainer(recipe, accelerator, dataset, None)
        train_teachers(recipe, shared)
        accelerator = build_accelerator(recipe.train, place.directory)
    variants = registry.used(recipe)
    check_variants(place, variants)
    teacher = build_teacher(recipe, dataset, accelerator)
    weights = on_main(lambda: weights_digests(recipe, teacher))
    check_teacher(place, weights)
    preflight, teacher_logits = run_preflight(recipe, teacher, dataset, accelerator) if teacher else (None, None)
    trainer = Trainer(recipe, accelerator, dataset, teacher)
    trainer.teacher_logits = teacher_logits
    trainer.open_cache()

    environment = run.describe_environment(
        num_processes=accelerator.num_processes,
        precision=recipe.train.precision,
        device=accelerator.device,
        threads=shared.threads,
    )
    if variants:
        environment["variants"] = variants
    on_main(lambda: directory.open(recipe, source=source, environment=environment))
    tracking = Tracking(
        directory,
        recipe,
        accelerator,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
    )
    try:
        status = on_main(lambda: run.read_status(place.directory))
        left_out = dataset.info.left_out
        if left_out:
            _log.warning("data: %d files are left out, the first: %s", len(left_out), left_out[0])
        directory.status(
            "running",
            data_digest=dataset.info.digest,
            data_left_out={"count": len(left_out), "first": left_out[:MOST_NAMED]},
            teacher_weights=weights,
            parameters=count_parameters(trainer.student, teacher),
        )
        if status.get("phase") != "control" or place.named:
            _log.info("run directory: %s", place.directory)
            _train(trainer, tracking, place, shared, preflight)
        if recipe.control:
            directory.status(phase="control")
            accelerator.free_memory()
            del trainer
            execute_control(recipe, place, shared, dataset)
            check_control(place.directory, tracking)
            on_main(lambda: describe_export(place.directory))
    finally:
        tracking.close()


def check_data(place: Place, dataset: Dataset) -> None:
    """Raise InputError if a resumed run began on other data."""
    digest = on_main(lambda: run.read_status(place.directory).get("data_digest"))
    if place.resumed and digest not in (None, dataset.info.digest):
        raise InputError(f"{place.directory}: this run began on other data than data.root and data.name now give.")


def check_variants(place: Place, variants: dict[str, str]) -> None:
    """Raise InputError if a resumed run began with other code in what plugins bring."""
    began_with = (
        on_main(lambda: run.read_environment(place.directory).get("variants", {})) if place.resumed else variants
    )
    for name in sorted({*began_with, *variants}):
        if began_with.get(name) != variants.get(name):
            raise InputError(
                f"{place.directory}: began with {name} from {began_with.get(name, 'this package')}, and this is "
                f"{variants.get(name, 'built in')}. Give the plugin as it was, or start a new run with another --out."
            )


def check_teacher(place: Place, weights: dict[str, str]) -> None:
    """Raise InputError if a resumed run began with other weights in its teachers; these have no hash but the one that
    was written down then.
    """
    began_with = on_main(lambda: run.read_status(place.directory).get("teacher_weights", {}))
    for where, digest in weights.items() if place.resumed else ():
        if began_with.get(where, digest) != digest:
            raise InputError(
                f"{where}: these teacher weights are not those that {place.directory} began with: their SHA-256 "
                "differs. Put the earlier ones back, or start a new run with another --out."
            )


def execute_control(recipe: Recipe, place: Place, shared: Launch, dataset: Dataset) -> None:
    """The control's run under `control/`, unless it is finished already."""
    control, directory = recipe.as_control(), place.directory / "control"
    if not on_main(lambda: run.is_finished(directory)):
        execute(control, on_main(lambda: newest_place(directory, control)), shared, dataset=dataset)


def _train(
    trainer: Trainer, tracking: Tracking, place: Place, shared: Launch, preflight: dict[str, Any] | None
) -> None:
    recipe, accelerator, directory = trainer.recipe, trainer.accelerator, tracking.run
    tracking.start()
    on_main(lambda: checkpoint.discard_after(directory.checkpoints, place.checkpoint))
    if place.checkpoint is not None:
        trainer.restore(place.checkpoint, directory)
        directory.log("resume", step=trainer.progress.step, epoch=trainer.epoch)
    else:
        directory.cut_metrics(0)
        directory.log("start", step=0, epoch=0, initial_weights=trainer.initial_weights, steps=trainer.total_steps)
        if preflight is not None:
            directory.log("preflight", step=0, epoch=0, **preflight)
    _log.info(
        "%s: %d steps (%d an epoch), %d process(es) of %d thread(s) on %s, precision %s",
        recipe.name, trainer.total_steps, trainer.steps_per_epoch, accelerator.num_processes, shared.threads,
        accelerator.device, recipe.train.precision,
    )  # fmt: skip
    if trainer.cache is not None:
        trainer.cache.start()
    with advising(trainer):
        trainer.fit(tracking, shared.stop)
    teacher = {"teacher": trainer.teacher.name, "teacher_sha256": trainer.teacher.digest} if trainer.teacher else {}
    metadata = {"recipe_sha256": recipe.digest(OPERATIONAL_KEYS), "run": recipe.name, **teacher}
    if variants := registry.used(recipe):
        metadata["variants"] = json.dumps(variants)
    trainer.finish(tracking, metadata)


def open_data(recipe: Recipe, accelerator: Accelerator) -> Dataset:
    """The recipe's data on this process's device; downloads and packing happen once, on the main process.

    Raises:
        InputError: they cannot be had, or have no order of ours that a teacher's cache could go by.
    """

    def open_it() -> Dataset:
        return open_dataset(
            recipe.data,
            seed=recipe.seed,
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )

    if accelerator.num_processes > 1:
        on_main(lambda: open_it() and None)
    dataset = open_it()
    if isinstance(dataset, SequentialDataset) and any(spec.cache for spec in recipe.teachers):
        raise InputError(
            f"teacher.cache: '{recipe.data.name}' is read in its reader's order, which changes with the number of "
            "processes; set teacher.cache=false"
        )
    return dataset


def train_teachers(recipe: Recipe, shared: Launch) -> None:
    """Train each teacher that comes as a recipe and is not trained yet, or was interrupted; or wait for another run
    that trains it.
    """
    for spec in recipe.teachers:
        while spec.recipe is not None and not on_main(partial(is_trained, recipe, spec)):
            teacher = teacher_recipe(recipe, spec)
            directory = teacher_place(recipe, spec)
            try:
                place = on_main(partial(newest_place, directory, teacher))
                _log.info("training the teacher %s first, in %s", teacher.name, directory)
                execute(teacher, place, shared, source=Path(spec.recipe))
            except run.InUse as holder:
                _log.info("waiting for the teacher %s: %s", teacher.name, str(holder).partition(". ")[0])
                while on_main(partial(run.holder_of, directory)) is not None:
                    time.sleep(1)
            except InputError:
                if not on_main(partial(is_trained, recipe, spec)):  # just now, by the other run
                    raise


def check_control(student: Path, tracking: Tracking) -> None:
    """Compare what student and control began with and saw. Collective.

    Raises:
        RunFailed: the control differs in more than the teacher.
    """

    def compare_them() -> dict[str, Any]:
        paths = (student, student / "control")
        starts = {line["initial_weights"] for path in paths for line in run.read_metrics(path, "start")}
        seen = [{line["step"]: line["batch"] for line in run.read_metrics(path, "epoch")} for path in paths]
        if len(starts) != 1 or seen[0] != seen[1]:
            what = "began from different weights" if len(starts) != 1 else "saw different batches"
            raise RunFailed(f"student and control {what}: the control would differ in more than the teacher.")
        epochs = len(seen[0])
        return {
            "step": max(seen[0], default=0),
            "epoch": epochs,
            "initial_weights": starts.pop(),
            "equal_batches": epochs,
        }

    tracking.run.log("control", **on_main(compare_them))


def count_parameters(student: torch.nn.Module, teacher: Teacher | None) -> dict[str, int]:
    counts = {"student": sum(parameter.numel() for parameter in student.parameters())}
    return counts if teacher is None else counts | {"teacher": teacher.num_parameters}


def show_result(directory: Path) -> None:
    """Write the comparison, print its table and say where everything is."""
    # Plots take half a second to import; the first step should not wait for them.
    from distill.report.comparison import compare
    from distill.report.document import write_report
    from distill.report.tables import render_console

    comparison = compare([directory])
    report = directory / "report.html"
    console.print(render_console(comparison))
    try:
        write_report(comparison, report)
    except OSError as error:
        reason = error.strerror or error
        _log.warning("%s: cannot be written: %s. The run is finished; write it with distill compare.", report, reason)
    for label, path in (("student", directory / "export"), ("report", report), ("run", directory)):
        if path.exists():
            say(f"{label:8} {path}")
