"""The training loop of one run."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import nn

from distill import registry
from distill.cores import CoreContention
from distill.data import Batch, BatchPlan, Dataset, Split
from distill.data.imbalance import class_weights
from distill.errors import Interrupted, RunFailed
from distill.evaluation import build_evaluator
from distill.files.digests import state_digest
from distill.launching.processes import on_main, with_process_index
from distill.launching.signals import StopRequest, deferred
from distill.options import StudentOptions
from distill.recipe import Recipe
from distill.run import Run
from distill.students import Student, build_student
from distill.students.plain import train_on_cpu
from distill.teaching.cache import TeacherCache, open_cache
from distill.teaching.moving_average import MovingAverage
from distill.teaching.source import Frozen, SourceContext, StepIndex, TeacherSource
from distill.tracking import Tracking
from distill.training.accumulator import MetricAccumulator
from distill.training.compilation import Compilation
from distill.training.gradient_shares import GradientShares
from distill.training.nonfinite import Ema, NonFiniteSteps
from distill.training.optim import (
    build_optimizer,
    clip_each,
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    warn_of_long_warmup,
    weight_decay,
)
from distill.training.saving import CheckpointWriter, Progress, TrainState, record_checkpoint, restore
from distill.training.task import build_task
from teachers import Teacher

LOADER_BOUND = 0.1
"""Fraction of the time spent waiting for data above which a warning is logged."""
CONTENDED = 0.2
"""Fraction of the threads' time spent waiting for a core above which a warning is logged."""
_log = logging.getLogger("distill")


class Trainer:
    """Model, losses, optimizer and progress of one run, and its training loop."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        dataset: Dataset,
        teacher: Teacher | None,
        student: StudentOptions | None = None,
    ) -> None:
        """Build student, losses, optimizer and schedule.

        Args:
            student: its options with the weights of its pretraining; None: the recipe's.

        Raises:
            InputError: the student cannot be built, or the batch size is not divisible by processes and accumulation.
        """
        self.recipe, self.accelerator, self.dataset, self.teacher = recipe, accelerator, dataset, teacher
        info, train = dataset.info, recipe.train
        self.plan = BatchPlan(
            seed=recipe.seed,
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        dataset.use_unlabelled(bool(recipe.distill))  # nothing else learns from them
        self.steps_per_epoch = dataset.steps_per_epoch(self.plan)
        self.schedule_steps = max(1, round(train.epochs * self.steps_per_epoch))
        self.total_steps = min(self.schedule_steps, train.max_steps or self.schedule_steps)
        warn_of_long_warmup(recipe.optim, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        self.student: Student = build_student(
            student or recipe.student,
            resolution=recipe.data.resolution,
            num_classes=0 if recipe.label_free else info.num_classes,
            channels=info.channels,
            mean=info.mean,
            std=info.std,
            seed=recipe.seed,
            other_sides=recipe.other_sides,
        )
        # Faster for convolutions, on a CPU too.
        self.student.to(memory_format=torch.channels_last)
        self.student.to(accelerator.device)
        train_on_cpu(self.student)
        self.initial_weights = state_digest(self.student.state_dict())
        average = recipe.average_teacher
        self.average = MovingAverage(self.student, average, total_steps=self.schedule_steps) if average else None
        if train.gradient_checkpointing:
            self.student.checkpoint_gradients()
        self.ema = ModelEmaV3(self.student, decay=train.ema, use_warmup=True) if train.ema else None
        self.compilation = Compilation(train, accelerator.device)
        self.compilation.apply(self.student)
        if self.average is not None:
            self.compilation.apply(self.average.student)
        for augmenter in dataset.augmenters:
            self.compilation.apply_to_augmentation(augmenter)
        self.source = self._source() if recipe.distill else None
        self.task = build_task(recipe, self.student, self.source, self.average, num_classes=info.num_classes)
        self.task.labelled_images = dataset.labelled_images(self.plan)
        if (weights := class_weights(recipe.data, info.class_names, info.class_images)) is not None:
            self.task.class_weights = torch.tensor(weights, device=accelerator.device)
        self.task.methods.to(accelerator.device)
        dataset.set_views(self.task.views)
        self.optimizer = accelerator.prepare(build_optimizer(recipe.optim, self.student.model, self.task.methods))
        self.model: nn.Module = accelerator.prepare(self.task)
        self.nonfinite = NonFiniteSteps(
            accelerator, self.model, self.task, self.optimizer, None if self.average is None else self.average.student
        )
        self.ema_updater = None if self.ema is None else Ema(self.ema, self.student)
        self.progress = Progress()
        self.saved = Progress()
        self.saving: Progress | None = None
        """That of the checkpoint which is being written."""
        self.writer = CheckpointWriter()
        self.accumulator = MetricAccumulator(accelerator)
        self.loader_bound = False
        self.contention = CoreContention()
        self.contended = False
        self.gradient_shares = GradientShares(train, accelerator, self.student)
        self.evaluator = build_evaluator(recipe, dataset, accelerator, batch_size=self.plan.micro_batch)

    def _source(self) -> TeacherSource | None:
        if self.teacher is not None:
            return Frozen(
                self.teacher,
                self.accelerator,
                self.compilation,
                self.plan,
                steps_per_epoch=self.steps_per_epoch,
                resolution=self.recipe.data.resolution,
            )
        if (options := self.recipe.source) is not None:
            context = SourceContext(self.student, self.accelerator, self.schedule_steps)
            source: TeacherSource = registry.find("teachers", options.source).implementation.build(options, context)
            return source
        return None

    @property
    def cache(self) -> TeacherCache | None:
        return self.source.cache if isinstance(self.source, Frozen) else None

    def open_cache(self) -> None:
        """Look up the teacher's stored logits if the recipe enables the cache; writes nothing. Collective.

        Raises:
            InputError: not enough disk space.
        """
        if isinstance(self.source, Frozen):
            self.source.cache = open_cache(
                self.recipe, self.teacher, self.dataset, self.accelerator, steps=self.total_steps, plan=self.plan
            )

    @property
    def epoch(self) -> float:
        return self.progress.step / self.steps_per_epoch

    @property
    def at_boundary(self) -> bool:
        """Whether this is the end of an epoch or of the run."""
        return self.progress.step == self.total_steps or self.progress.step % self.steps_per_epoch == 0

    def is_logged(self, step: int) -> bool:
        """Whether a line of metrics is due after so many steps: every `train.log_every`, and at the end of an epoch, or
        of the run, that would have none.
        """
        every, epoch = self.recipe.train.log_every, self.steps_per_epoch
        epoch_ends = step % epoch == 0 or step == self.total_steps
        return step % every == 0 or (epoch_ends and step // every * every <= (step - 1) // epoch * epoch)

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate here: at the end of the run, and of every `train.evaluate_every` epochs."""
        every = (self.recipe.train.evaluate_every or 1) * self.steps_per_epoch
        return self.progress.step == self.total_steps or self.progress.step % every == 0

    @property
    def selection_split(self) -> Split | None:
        """The split on which the best checkpoint is selected; None: there is none, and the last checkpoint is used."""
        if self.recipe.data.select_on == "test":
            return "test"
        return "validation" if self.dataset.info.sizes.get("validation") else None

    def fit(self, tracking: Tracking, stop: StopRequest) -> None:
        """Train to the end, with evaluations and checkpoints.

        Raises:
            Interrupted: a stop was requested; a checkpoint was saved.
            RunFailed: too many non-finite steps in a row.
        """
        train, progress, run, display = self.recipe.train, self.progress, tracking.run, tracking.display
        with display, deferred(), closing(self.writer):
            display.advance(progress.step)
            if self.evaluation_due and progress.evaluated_at < progress.step:
                self.evaluate(tracking)  # resumed between an epoch's last step and its evaluation
            self.accumulator.start_clock()
            self.accumulator.take_seconds()  # what came before is no training
            compiled_at = progress.step + self.compilation.steps
            unmixed = self.recipe.data.augment.mix_off_epoch
            if self.dataset.augmenter.paired and unmixed * self.steps_per_epoch >= self.total_steps:
                _log.warning("data.augment.mix_off_epoch: epoch %d is not reached; all images are mixed", unmixed)
            while progress.step < self.total_steps:
                epoch, first_step = divmod(progress.step, self.steps_per_epoch)
                self.model.train()
                batches = self.dataset.training_batches(self.plan, epoch, first_step)
                batches = self.saved_if_interrupted(with_process_index(batches), run)
                for micro_batches in self.accumulator.timed(batches):
                    if progress.step % self.steps_per_epoch == 0:
                        # Only the first sample of the global batch: it does not depend on the number of processes.
                        first = micro_batches[0].first()
                        device = self.accelerator.device.type
                        run.log("epoch", step=progress.step, epoch=epoch, batch=first.digest(), device=device)
                    if self.compilation.enabled and self.grows_at(progress.step):
                        compiled_at = self.begin_compilation(compiled_at)
                    self.train_step(micro_batches)
                    progress.step += 1
                    if progress.step == compiled_at:
                        self.end_compilation()
                    display.advance(progress.step)
                    if self.is_logged(progress.step):
                        self.log(tracking)
                    if (reason := stop.reason()) is not None:
                        self.save(run)
                        self.finish_saving()
                        raise Interrupted(reason)
                    if self.at_boundary:
                        break
                    if train.checkpoint_every and progress.step % train.checkpoint_every == 0:
                        with self.accumulator.paused():
                            self.save(run)
                self.read_skipped()  # waits for the device: what it still computes is training
                with self.accumulator.paused():
                    if self.evaluation_due:
                        self.evaluate_or_save(tracking)
                    if self.checkpoint_due() or progress.step == self.total_steps:
                        self.save(run)
            self.finish_saving()

    def grows_at(self, step: int) -> bool:
        """Whether the student's images have another size from this step on (`data.growth`)."""
        before, now = (self.recipe.training_side(at / self.schedule_steps) for at in (max(0, step - 1), step))
        return before != now

    def begin_compilation(self, compiled_at: int) -> int:
        """Count the time until now as training, unless a compilation ends only at step `compiled_at`; returns the step
        at which that of the next one ends.
        """
        if self.progress.step >= compiled_at:
            self.read_skipped()  # waits for the device
            self.progress.training_seconds += self.accumulator.take_seconds()
        return self.progress.step + self.compilation.steps

    def end_compilation(self) -> None:
        """Count the time until now as compilation, and begin that of training."""
        if self.compilation.on_cuda:
            torch.cuda.synchronize()
        self.progress.compilation_seconds += self.accumulator.take_seconds()
        if not self.is_logged(self.progress.step):  # else a line of at least one step
            self.accumulator.start_clock()

    def saved_if_interrupted(self, batches: Iterator[list[Batch]], run: Run) -> Iterator[list[Batch]]:
        """Yield the batches unchanged; if interrupted while waiting for one, save a checkpoint first."""
        try:
            yield from batches
        except Interrupted as stopped:
            if not stopped.alone:
                self.finish_saving()
                if self.saved.step < self.progress.step:
                    self.save(run)
                    self.finish_saving()
            raise

    def evaluate_or_save(self, tracking: Tracking) -> None:
        """Evaluate; if interrupted, save the state before it, so that a resumed run repeats the evaluation."""
        run = tracking.run
        before, size = replace(self.progress), run.metrics.size
        try:
            self.evaluate(tracking)
        except Interrupted as stopped:
            if not stopped.alone:
                self.progress = before
                run.cut_metrics(size)
                self.save(run)
                self.finish_saving()
            raise

    def checkpoint_due(self) -> bool:
        """Whether to save at the end of this epoch: by the interval, or because it is the best so far."""
        every = self.recipe.train.checkpoint_every
        return every is None or self.progress.step % every == 0 or self.progress.best_step == self.progress.step

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step on this process's share of the global batch."""
        recipe, step = self.recipe, self.progress.step
        rate = learning_rate(recipe.optim, step, steps_per_epoch=self.steps_per_epoch, total_steps=self.schedule_steps)
        set_learning_rate(self.optimizer, rate)
        set_weight_decay(self.optimizer, weight_decay(recipe.optim, step, total_steps=self.schedule_steps))
        progress = step / self.schedule_steps
        self.compilation.begin_step()
        self.nonfinite.begin_step()
        losses = []
        for index, batch in enumerate(micro_batches):
            # The model's random numbers (drop path) are a function of the step, so that a resumed run draws the same.
            torch.manual_seed(_seed_of(recipe.seed, step, self.accelerator.process_index, index))
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                shares_due = self.gradient_shares.enabled and index == 0 and self.is_logged(step + 1)
                with self.gradient_shares.forward_pass(shares_due):
                    loss, parts = self.model(batch, StepIndex(step, index), progress)
                with self.nonfinite.statistics_kept() if recipe.train.gradient_checkpointing else nullcontext():
                    if shares_due:
                        self.gradient_shares.measure(parts, self.task.weights(progress))
                    self.accelerator.backward(loss / len(micro_batches))
            self.accumulator.add(loss, {name: part.detach() for name, part in parts.items()}, self.task.measurements)
            losses.append(loss.detach())
        norm = self.nonfinite.check(step, losses, [batch.indices for batch in micro_batches])
        if (limit := recipe.optim.clip_grad) is not None:
            if recipe.optim.clip_mode == "tensor":
                if self.accelerator.scaler is not None:
                    self.accelerator.unscale_gradients()
                clip_each(self.model.parameters(), limit)
            elif self.accelerator.scaler is None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
            else:  # the norm is that of scaled gradients
                self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        # Optimizers that use random numbers, such as timm's Kron, draw the same on all processes.
        torch.manual_seed(_seed_of(recipe.seed, step))
        self.nonfinite.step()
        self.optimizer.zero_grad()
        self.task.after_step(step, self.nonfinite.skipped)
        if self.ema_updater is not None:
            self.ema_updater.update(step, self.nonfinite.skipped)
        self.accumulator.step(self.nonfinite.skipped)

    def read_skipped(self) -> None:
        """Fetch the skipped-step flags from the device; synchronises.

        Raises:
            RunFailed: too many non-finite steps in a row.
        """
        self.accumulator.skipped += self.nonfinite.read(self.recipe.train.max_bad_steps)

    def log(self, tracking: Tracking) -> None:
        """Log the means over all processes since the last call."""
        self.writer.poll()
        self.read_skipped()
        self.progress.training_seconds += self.accumulator.take_seconds()
        values = self.accumulator.read(self.plan.batch_size) | self.gradient_shares.read()
        weights = self.recipe.loss_weights((self.progress.step - 1) / self.schedule_steps)
        values |= {f"weight/{name}": weights.get(name, 0.0) for name in self.recipe.scheduled}
        if (cache := self.cache) is not None:
            if (hits := cache.take_hits()) is not None:
                values["teacher_cache/hits"] = hits
            cache.flush()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0].get("lr_scale", 1.0)
        tracking.training(self.progress.step, self.epoch, values | {"lr": rate})
        if self.dataset.streamed and not self.loader_bound and values["data_wait"] > LOADER_BOUND:
            self.loader_bound = True
            _log.warning(
                "step %d: %.0f %% of the time since the last line was spent waiting for data; raise data.workers if "
                "there are idle cores",
                self.progress.step, 100 * values["data_wait"],
            )  # fmt: skip
        threads = torch.get_num_threads()
        if threads > 1 and not self.contended and (waiting := self.contention.fraction(threads)) > CONTENDED:
            self.contended = True
            _log.warning(
                "step %d: the %d threads spent %.0f %% of their time waiting for cores that other processes use; to go "
                "faster, stop this run and resume it with train.threads=%d",
                self.progress.step, threads, 100 * waiting, threads - 1,
            )  # fmt: skip

    @property
    def seconds(self) -> dict[str, float]:
        """What this run's time went to so far, interrupted launches included."""
        progress = self.progress
        return {
            "training": round(progress.training_seconds, 2),
            "compilation": round(progress.compilation_seconds, 2),
            "evaluation": round(progress.evaluation_seconds, 2),
        }

    def evaluate(self, tracking: Tracking) -> None:
        """Evaluate raw and EMA weights on the selection split, and update the best so far."""
        began = time.perf_counter()
        split, progress = self.selection_split, self.progress
        progress.evaluated_at = progress.step
        if split is None:
            return
        candidates = {"raw": self.student} if self.averaged is None else {"raw": self.student, "ema": self.averaged}
        for weights, student in candidates.items():
            # Batch statistics differ between processes. Evaluate with those that are saved: the main process's.
            for buffer in student.buffers():
                broadcast(buffer)
            values = self.evaluator(student, split)
            tracking.evaluation(progress.step, self.epoch, split, weights, values)
            if (primary := values[self.evaluator.primary]) > progress.best_top1:
                progress.best_top1, progress.best_step, progress.best_weights = primary, progress.step, weights
        progress.evaluation_seconds += time.perf_counter() - began

    @property
    def averaged(self) -> Student | None:
        """The weights `ema`: of `train.ema`, or of `teacher.ema`."""
        if self.average is not None:
            return self.average.student
        return None if self.ema is None else self.ema.module

    @property
    def state(self) -> TrainState:
        keep = self.recipe.train.keep_checkpoints
        return TrainState(
            self.student, self.task.methods, self.source, self.averaged, self.optimizer, self.accelerator.scaler, keep
        )

    def save(self, run: Run) -> None:
        """Begin to write a checkpoint, after the one before. Collective."""
        self.finish_saving()
        self.read_skipped()
        self.progress.training_seconds += self.accumulator.take_seconds()
        metrics = self.accumulator.state()
        if self.cache is not None:
            self.cache.flush()
        self.saving = replace(self.progress)
        on_main(lambda: self.writer.start(self.state, self.progress, run, epoch=self.epoch, also={"metrics": metrics}))

    def finish_saving(self) -> None:
        """Wait until the checkpoint is written. A failure is a warning, since the next one may succeed. Collective.

        Raises:
            RunFailed: the last checkpoint of the run cannot be written.
        """
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        if (problem := on_main(self.writer.wait)) is None:
            self.saved = saving
            return
        if saving.step == self.total_steps:
            raise RunFailed(problem)
        _log.warning("%s Training continues; older checkpoints are intact.", problem)
        if self.progress.best_step == saving.step:  # its weights are lost
            self.progress.copy_best(self.saved)

    def restore(self, folder: Path, run: Run) -> None:
        """Continue from a checkpoint, which is verified first."""
        self.progress, state = restore(self.state, folder, run)
        self.saved = replace(self.progress)
        self.accumulator.resume(state["metrics"])
        on_main(lambda: record_checkpoint(self.state, folder, self.progress, run, epoch=self.epoch))
        _log.info("resumed from %s", folder)


def _seed_of(*position: int) -> int:
    text = "/".join(map(str, position))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
