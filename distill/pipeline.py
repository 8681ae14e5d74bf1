"""A whole run: the teacher first where a recipe trains it, its preflight, the student, the control, the comparison."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from distill import checkpoint, registry, run
from distill.console import set_up_logging
from distill.data import Dataset, open_dataset
from distill.data.given import GivenData
from distill.data.sequential import SequentialDataset
from distill.errors import InputError, RunFailed
from distill.given import Given
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
from distill.recipe import OPERATIONAL_KEYS, Recipe
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
    given: Given


@contextmanager
def joined(given: Given) -> Iterator[Launch]:
    """Start the processes of this launch, which log on the main one and stop together; the `StopRequest` is made
    before. An exception within becomes that of the process that failed first. Collective.
    """
    stop = StopRequest.current()
    stop.loaded()
    threads = set_threads()
    set_up_logging(is_main=start_processes().is_main_process)
    join_processes(stop)
    try:
        yield Launch(stop, threads, given)
    except BaseException as error:
        cause = stop.exit_cause(error)
        if cause is error:
            raise
        raise cause from error


def launch(recipe: Recipe, *, source: Path | None, out: Path | None, resume: str | None, given: Given) -> Path:
    """Run a recipe on all processes of this launch; its run directory, once it is finished and has its report.

    Args:
        source: the recipe's file, if it has one.

    Raises:
        InputError: something the user gave cannot be used; nothing half-written is left.
        RunFailed: the run cannot go on.
        Interrupted: stopped early, resumable.
    """
    with joined(given) as shared:
        recipe = with_precision(recipe)
        place = on_main(lambda: locate(recipe, out, resume, given))
        shared.stop.limit(recipe.train.max_minutes)
        execute(recipe, place, shared, source=source)
        shared.stop.finish()
        if PartialState().is_main_process:
            report_on(place.directory)
        return place.directory


def locate(recipe: Recipe, out: Path | None, resume: str | None, given: Given) -> Place:
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
        directory = resumed_directory(out, resume) or target
        if not target.is_dir() or not run.read_status(directory):
            raise InputError(f"--resume {resume}: neither a run directory nor a checkpoint in one.")
        if out is not None and out.resolve() != directory:
            raise InputError(f"--out {out}: a resumed run stays in its directory, {directory}. Leave --out away.")
        if directory != target:
            check_given(directory, given)
            run.check_resumable(directory, recipe)
            checkpoint.verify(target)
            return Place(directory, target, resumed=True, named=True)
    return newest_place(directory, recipe, given)


def newest_place(directory: Path, recipe: Recipe, given: Given) -> Place:
    """A run at `directory`, continued where it stopped, or from its beginning where there is none yet.

    Raises:
        InputError: it cannot be continued.
    """
    if not run.read_status(directory):
        return Place(directory)
    check_given(directory, given)
    run.check_resumable(directory, recipe)
    return Place(directory, checkpoint.newest_intact(directory / "checkpoints"), resumed=True)


def resumed_directory(out: Path | None, resume: str | None) -> Path | None:
    """The run that --out and --resume name; None where they leave it to the recipe, or name a new one."""
    if resume in (None, "auto"):
        return out if resume else None
    target = Path(str(resume)).resolve()
    return target.parent.parent if target.parent.name == "checkpoints" else target


def check_given(directory: Path | None, given: Given) -> None:
    """Raise InputError if the run at `directory` began with what Python code handed over, and does not now."""
    if directory is not None and (directory / "resolved.yaml").exists():
        given.check_all_there(run.read_recipe(directory), directory)


def execute(
    recipe: Recipe, place: Place, shared: Launch, *, source: Path | None = None, dataset: Dataset | None = None
) -> None:
    """One run, from wherever it stands to `finished`; its teacher's and its control's run within."""
    directory = Run(place.directory, is_main=PartialState().is_main_process)
    on_main(directory.claim)
    shared.stop.runs.append(directory)
    try:
        _execute(recipe, place, shared, directory, source=source, dataset=dataset)
        directory.status("finished")
        if shared.stop.runs[0] is not directory:
            shared.stop.runs.remove(directory)
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
        dataset = open_data(recipe, accelerator, shared.given.data)
    check_data(place, dataset)
    if not on_main(lambda: all(is_trained(recipe, spec) for spec in recipe.teachers)):
        # What is wrong with the student shows before its teacher is trained.
        Trainer(recipe, accelerator, dataset, None)
        train_teachers(recipe, shared)
        accelerator = build_accelerator(recipe.train, place.directory)
    variants = registry.used(recipe)
    check_variants(place, variants)
    teacher = build_teacher(recipe, dataset, accelerator, shared.given.teacher)
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
        execute(control, on_main(lambda: newest_place(directory, control, shared.given)), shared, dataset=dataset)


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
    with advising(recipe, trainer.plan, trainer.dataset.augmenter.paired):
        trainer.fit(tracking, shared.stop)
    teacher = {"teacher": trainer.teacher.name, "teacher_sha256": trainer.teacher.digest} if trainer.teacher else {}
    metadata = {"recipe_sha256": recipe.digest(OPERATIONAL_KEYS), "run": recipe.name, **teacher}
    if variants := registry.used(recipe):
        metadata["variants"] = json.dumps(variants)
    trainer.finish(tracking, metadata)


def open_data(recipe: Recipe, accelerator: Accelerator, given: GivenData | None = None) -> Dataset:
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
            given=given,
        )

    if accelerator.num_processes > 1 and given is None:
        on_main(lambda: open_it() and None)
    dataset = open_it()
    if given is not None and len(set(gather_object([dataset.info.digest]))) > 1:
        raise InputError("data: not the same on all processes. Give each of them the same data, in the same order.")
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
                place = on_main(partial(newest_place, directory, teacher, shared.given))
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


def report_on(directory: Path) -> None:
    """Write the comparison of a finished run; what keeps it from being written is a warning."""
    # Plots take half a second to import; the first step should not wait for them.
    from distill.report.comparison import compare
    from distill.report.document import write_report

    report = directory / "report.html"
    try:
        write_report(compare([directory]), report)
    except OSError as error:
        reason = error.strerror or error
        _log.warning("%s: cannot be written: %s. The run is finished; write it with distill compare.", report, reason)
