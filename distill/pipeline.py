"""A whole run: training of the teacher if needed, preflight, student, control and report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from distill import checkpoint, run
from distill.console import Stages, set_up_logging
from distill.data import Dataset, open_dataset
from distill.data.facts import facts
from distill.data.given import GivenData
from distill.data.sequential import SequentialDataset
from distill.data.unlabelled import warn_of_leaks
from distill.environment import describe_environment
from distill.errors import InputError
from distill.files.regular import reachable
from distill.finishing import check_control, describe_export, finish, report_on
from distill.flops import count_flops
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
from distill.recipe import OPERATIONAL_KEYS, Pretrain, Recipe, used
from distill.recipe import Teacher as TeacherSpec
from distill.resumption import (
    RunLocation,
    check_data,
    check_initial_weights,
    check_teacher,
    check_variants,
    locate,
    newest_location,
)
from distill.run import Run
from distill.students import Student
from distill.teaching.earlier import (
    check_trained_on,
    directory_of,
    earlier_runs,
    initial_student,
    initial_weights_digest,
    is_trained,
    recipe_of,
)
from distill.teaching.teachers import build_teacher, described_origins, run_preflight, weights_digests
from distill.tracking import Tracking
from distill.trainer import Trainer
from teachers import Teacher

MAX_NAMED = 10
"""Most skipped data files that status.json lists."""
_log = logging.getLogger("distill")


@dataclass(frozen=True)
class Launch:
    """State shared by all runs of one launch."""

    stop: StopRequest
    threads: int
    given: Given
    stages: Stages = field(default_factory=Stages)


@contextmanager
def joined() -> Iterator[StopRequest]:
    """Start the processes of this launch; needs a `StopRequest`. An exception within is replaced by that of the process
    that failed first. Collective.
    """
    stop = StopRequest.current()
    stop.loaded()
    set_up_logging(is_main=start_processes().is_main_process)
    join_processes(stop)
    try:
        yield stop
    except BaseException as error:
        cause = stop.exit_cause(error)
        if cause is error:
            raise
        raise cause from error


def launch(recipe: Recipe, *, source: Path | None, out: Path | None, resume: str | None, given: Given) -> Path:
    """Run a recipe on all processes of this launch, with its report; returns the run directory.

    Args:
        source: the recipe's file, if it has one.

    Raises:
        InputError: the recipe or an argument cannot be used; nothing half-written is left.
        RunFailed: the run cannot continue.
        Interrupted: stopped early, resumable.
    """
    with joined() as stop:
        recipe = with_precision(recipe)
        with reachable():
            location = on_main(lambda: locate(recipe, out, resume, given))
        earlier = on_main(lambda: run.read_environment(location.directory)) if location.resumed else {}
        stages = on_main(lambda: stages_of(recipe, location))
        shared = Launch(stop, set_threads(recipe.train.threads, earlier.get("threads")), given, Stages(stages))
        shared.stop.limit(recipe.train.max_minutes)
        execute(recipe, location, shared, "student", source=source)
        shared.stop.finish()
        if recipe.train.test and PartialState().is_main_process:
            report_on(location.directory)
        return location.directory


def stages_of(recipe: Recipe, location: RunLocation) -> list[str]:
    """What the launch has to do, one after the other."""
    earlier = [stage_of(spec) for spec in earlier_runs(recipe) if not is_trained(recipe, spec)]
    analysis = ["analysis"] if location.analysed and recipe.report.analysis == "full" else []
    if not recipe.train.test:
        return [*earlier, "student"]
    return [*earlier, "student", *analysis, *(["control", *analysis] if recipe.control else [])]


def stage_of(spec: TeacherSpec | Pretrain) -> str:
    """The name of the stage that trains it."""
    return "teacher" if isinstance(spec, TeacherSpec) else "pretraining"


def execute(
    recipe: Recipe,
    location: RunLocation,
    shared: Launch,
    stage: str,
    *,
    source: Path | None = None,
    dataset: Dataset | None = None,
) -> None:
    """Execute or continue one run to its end, its teacher's and control's runs included; `stage`: its name."""
    directory = Run(location.directory, is_main=PartialState().is_main_process)
    on_main(directory.claim)
    shared.stop.runs.append(directory)
    try:
        with reachable(lambda: not directory.opened):
            _execute(recipe, location, shared, directory, stage, source=source, dataset=dataset)
        directory.status("finished" if recipe.train.test else "trained")
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
    recipe: Recipe,
    location: RunLocation,
    shared: Launch,
    directory: Run,
    stage: str,
    *,
    source: Path | None,
    dataset: Dataset | None,
) -> None:
    accelerator = build_accelerator(recipe.train, location.directory)
    if dataset is None:
        dataset = open_data(recipe, accelerator, shared.given.data)
    check_data(location, dataset)
    if not on_main(lambda: all(is_trained(recipe, spec) for spec in earlier_runs(recipe))):
        # Report errors of the student before its teacher is trained, or its weights are.
        planned = Trainer(recipe, accelerator, dataset, None).total_steps * (1 + recipe.control)
        shared.stages.later_steps += planned
        train_earlier(recipe, shared)
        shared.stages.later_steps -= planned
        accelerator = build_accelerator(recipe.train, location.directory)
    variants = used(recipe)
    check_variants(location, variants)
    teacher = build_teacher(recipe, dataset, accelerator, shared.given.teacher)
    weights = on_main(lambda: weights_digests(recipe, teacher))
    check_teacher(location, weights)
    if (pretrain := recipe.pretrain) is not None:
        on_main(lambda: check_trained_on(recipe, pretrain, dataset))
    initial_weights = on_main(lambda: initial_weights_digest(recipe))
    check_initial_weights(location, initial_weights)
    preflight, teacher_logits = run_preflight(recipe, teacher, dataset, accelerator) if teacher else (None, None)
    trainer = Trainer(recipe, accelerator, dataset, teacher, initial_student(recipe))
    if preflight is not None and teacher_logits is not None:
        trainer.evaluator.teacher_logits[preflight["split"]] = teacher_logits
    trainer.open_cache()

    environment = describe_environment(
        num_processes=accelerator.num_processes,
        precision=recipe.train.precision,
        device=accelerator.device,
        threads=shared.threads,
    )
    if variants:
        environment["variants"] = variants
    on_main(lambda: directory.open(recipe, source=source, environment=environment, held_out=dataset.info.held_out))
    tracking = Tracking(
        directory,
        recipe,
        accelerator,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
        stage=shared.stages.label(stage),
        later_steps=shared.stages.later_steps + trainer.total_steps * recipe.control,
    )
    try:
        status = on_main(lambda: run.read_status(location.directory))
        for key, value in facts(dataset.info, recipe.data, methods=bool(recipe.distill)):
            _log.info("%s: %s", key, value)
        if recipe.distill and accelerator.is_main_process:
            warn_of_leaks(dataset)
        if accelerator.is_main_process:
            _log.info("student: %s", described(trainer.student, dataset.info.channels, recipe))
        left_out = dataset.info.left_out
        if left_out:
            _log.warning("data: %d files are skipped, the first: %s", len(left_out), left_out[0])
        directory.status(
            "running",
            data_digest=dataset.info.digest,
            data_sizes=dict(dataset.info.sizes),
            class_images=dict(zip(dataset.info.class_names, dataset.info.class_images, strict=False)),
            selected_by=trainer.evaluator.primary,
            unlabelled_digest=dataset.info.unlabelled_digest,
            data_left_out={"count": len(left_out), "first": left_out[:MAX_NAMED]},
            training_images={"labelled": dataset.info.sizes["train"], "unlabelled": dataset.info.unlabelled},
            teacher_weights=weights,
            initial_weights=initial_weights,
            parameters=count_parameters(trainer.student, teacher),
        )
        if status.get("phase") != "control" or location.named:
            _log.info("run directory: %s", location.directory)
            _train(trainer, tracking, location, shared, preflight)
        tracking.close()  # a tracker has one run at a time, and the control's is next
        if recipe.control and recipe.train.test:
            directory.status(phase="control")
            accelerator.free_memory()
            del trainer
            execute_control(recipe, location, shared, dataset)
            tracking.reopen()
            check_control(location.directory, tracking)
            on_main(lambda: describe_export(location.directory))
            tracking.close()
    except BaseException:
        tracking.close(failed=True)
        raise


def execute_control(recipe: Recipe, location: RunLocation, shared: Launch, dataset: Dataset) -> None:
    """Execute the control's run under `control/`, unless it is finished."""
    control, directory = recipe.as_control(), location.directory / "control"
    if not on_main(lambda: run.is_finished(directory)):
        location = on_main(lambda: newest_location(directory, control, shared.given))
        execute(control, location, shared, "control", dataset=dataset)


def _train(
    trainer: Trainer, tracking: Tracking, location: RunLocation, shared: Launch, preflight: dict[str, Any] | None
) -> None:
    recipe, accelerator, directory = trainer.recipe, trainer.accelerator, tracking.run
    on_main(lambda: checkpoint.discard_after(directory.checkpoints, location.checkpoint))
    if location.checkpoint is not None:
        trainer.restore(location.checkpoint, directory)
    else:
        directory.cut_metrics(0)
    tracking.start(trainer.progress.step if location.resumed else None)
    if location.checkpoint is not None:
        directory.log("resume", step=trainer.progress.step, epoch=trainer.epoch)
    else:
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
    if not recipe.train.test:
        directory.status(seconds=trainer.seconds)
        return
    teacher = {}
    if (taught_by := trainer.teacher) is not None:
        teacher = {"teacher": taught_by.name, "teacher_sha256": taught_by.digest, **described_origins(taught_by)}
    metadata = {"recipe_sha256": recipe.digest(OPERATIONAL_KEYS), "run": recipe.name, **teacher}
    if (unlabelled := trainer.dataset.info.unlabelled) and recipe.distill and recipe.data.unlabelled_share != 0:
        metadata["unlabelled_images"] = str(unlabelled)
    if recipe.pretrain is not None:
        metadata["pretrained_by"] = str(recipe.pretrain.recipe)
    if variants := used(recipe):
        metadata["variants"] = json.dumps(variants)
    shared.stages.done += 1
    analysed = location.analysed and recipe.report.analysis == "full"
    finish(trainer, tracking, metadata, shared.stages.label("analysis") if analysed else None)
    shared.stages.done += analysed


def open_data(recipe: Recipe, accelerator: Accelerator, given: GivenData | None = None) -> Dataset:
    """The recipe's data on this process's device; the main process downloads and packs them first.

    Raises:
        InputError: they cannot be opened, or their order does not allow a teacher cache.
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


def train_earlier(recipe: Recipe, shared: Launch) -> None:
    """Execute each unfinished run that a recipe needs first, or wait for another process that does."""
    for spec in earlier_runs(recipe):
        what = "teacher" if isinstance(spec, TeacherSpec) else "student's initial weights"
        while not on_main(partial(is_trained, recipe, spec)):
            earlier, directory = recipe_of(recipe, spec), directory_of(recipe, spec)
            try:
                location = replace(on_main(partial(newest_location, directory, earlier, shared.given)), analysed=False)
                _log.info("training the %s first: %s, in %s", what, earlier.name, directory)
                execute(earlier, location, shared, stage_of(spec), source=Path(str(spec.recipe)))
            except run.InUse as holder:
                _log.info("waiting for the %s, %s: %s", what, earlier.name, str(holder).partition(". ")[0])
                while on_main(partial(run.holder_of, directory)) is not None:
                    time.sleep(1)
            except InputError as error:
                if error.process is not None:  # of one process: the others are elsewhere, and wait
                    raise
                if not on_main(partial(is_trained, recipe, spec)):  # the other run has just finished it
                    raise


def described(student: Student, channels: int, recipe: Recipe) -> str:
    """What the student is and costs."""
    side = recipe.data.resolution
    flops = count_flops(student, torch.zeros(1, channels, side, side))
    parameters = count_parameters(student, None)["student"]
    return f"{recipe.student.model}, {parameters / 1e6:.2f} M parameters, {flops / 1e9:.4f} GFLOPs an image"


def count_parameters(student: torch.nn.Module, teacher: Teacher | None) -> dict[str, int]:
    counts = {"student": sum(parameter.numel() for parameter in student.parameters())}
    return counts if teacher is None else counts | {"teacher": teacher.num_parameters}
