"""`--dry-run`: everything up to the first step, without a run directory. Missing data and weights are downloaded."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.console import say
from distill.data.facts import facts
from distill.data.unlabelled import warn_of_leaks
from distill.errors import RunFailed
from distill.flops import count_flops
from distill.given import Given
from distill.launching.processes import build_accelerator, set_threads, with_precision
from distill.out_of_memory import advising
from distill.pipeline import count_parameters, joined, open_data
from distill.recipe import Recipe
from distill.run import RUNS
from distill.teaching.earlier import earlier_runs, initial_student, is_trained, recipe_of
from distill.teaching.teachers import build_teacher, run_preflight
from distill.trainer import Trainer


def dry_run(recipe: Recipe, given: Given) -> None:
    """Build everything, run preflight and one step, and print sizes and costs; on all processes of this launch."""
    with joined() as stop:
        set_threads(recipe.train.threads)
        recipe = with_precision(recipe)
        _dry_run(recipe, build_accelerator(recipe.train, Path()), given)
        stop.finish()


def _dry_run(recipe: Recipe, accelerator: Accelerator, given: Given) -> None:
    dataset = open_data(recipe, accelerator, given.data)
    untrained = [spec for spec in earlier_runs(recipe) if not is_trained(recipe, spec)]
    for spec in untrained:
        say(f"{spec.recipe} is not trained yet: its own dry run, then that of the student without it.")
        _dry_run(recipe_of(recipe, spec), accelerator, given)
    original, preflight = recipe, None
    if any(spec is not recipe.pretrain for spec in untrained):
        recipe = _without_frozen_teacher(recipe)
    teacher = build_teacher(recipe, dataset, accelerator, given.teacher)
    if teacher is not None:
        preflight, _ = run_preflight(recipe, teacher, dataset, accelerator)
    initial = None if recipe.pretrain in untrained else initial_student(recipe)
    trainer = Trainer(recipe, accelerator, dataset, teacher, initial)
    trainer.open_cache()
    trainer.model.train()
    with advising(recipe, trainer.plan, dataset.augmenter.paired):
        batch = next(trainer.dataset.training_batches(trainer.plan, 0, 0))
        trainer.train_step(batch)
        trainer.read_skipped()
        values = trainer.accumulator.read(recipe.train.batch_size)
        began = time.perf_counter()
        if not trainer.compilation.enabled:  # else more steps would be compiled
            trainer.train_step(batch)
            trainer.read_skipped()
        seconds = time.perf_counter() - began
        if recipe.data.growth is not None:  # images of full size need the most memory
            trainer.progress.step = trainer.total_steps - 1
            trainer.train_step(batch)
    if "bad_steps" in values:
        raise RunFailed(
            "the first step: the loss or its gradients are not finite, so a run would skip it. Check the data and the "
            "teacher, or train in fp32 (train.precision)."
        )
    if not accelerator.is_main_process:
        return
    memory = peak_memory(accelerator.device)
    info, side = dataset.info, recipe.data.resolution
    flops = count_flops(trainer.student, torch.zeros(1, info.channels, side, side))
    counts = count_parameters(trainer.student, teacher)
    say(f"recipe      {original.name}, seed {original.seed}, {recipe.train.precision} on {accelerator.device}")
    for key, value in facts(info, recipe.data, methods=bool(original.distill)):
        say(f"{key:<12}{value}")
    warn_of_leaks(dataset)
    if teacher is not None and preflight is not None:
        top1 = f"; preflight {preflight['teacher/top1']:.2f} %" if "teacher/top1" in preflight else ""
        say(f"teacher     {teacher.describe()}{top1}")
    methods = [f"{section.method} {section.weight_at(0.0):g}" for section in original.distill]
    methods.append(f"labels {original.label_weight:g}")
    say(f"student     {original.student.model}, learning by {', '.join(methods)}")
    say(f"parameters  student {counts['student']:,}" + (f", teacher {teacher.num_parameters:,}" if teacher else ""))
    say(f"FLOPs       {flops / 1e9:.4f} G for the student's forward pass of one image")
    say(f"memory      {memory / 2**20:,.0f} MiB at its peak in this process")
    say(f"steps       {trainer.total_steps:,}, {trainer.steps_per_epoch:,} an epoch")
    if not trainer.compilation.enabled:
        minutes = seconds * trainer.total_steps / 60
        again = ", and for its control as many at most" if original.control else ""
        say(f"time        some {minutes:.1f} minutes of training at {1000 * seconds:.0f} ms a step{again}")
    if trainer.cache is not None:
        file = trainer.cache.file
        say(f"cache       {file.path}, {file.size / 1e6:,.1f} MB, of which {file.missing / 1e6:,.1f} MB are missing")
    say(f"writes      {RUNS / original.name}-DATE, or --out: checkpoints, export, predictions, metrics and report")
    loss = f"loss {values['loss']:.4f}" if "loss" in values else "skipped, while the gradient scaler finds its scale"
    say(f"first step  {loss}")


def _without_frozen_teacher(recipe: Recipe) -> Recipe:
    """The recipe with those of its methods that need nothing but the student's moving average."""
    kept = [one for one in recipe.distill if one.needs.average and not (one.needs.logits or one.needs.maps)]
    if not kept:
        return recipe.as_control()
    teachers = [spec.model_copy(update={"recipe": None, "model": None, "weights": None}) for spec in recipe.teachers]
    return recipe.replace(teacher=teachers[0], distill=kept, control=False)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most: of a GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
