"""The loop: one student, from its first step, or from a checkpoint, to its last."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import nn

from distill import registry
from distill.analysis.energy import EnergyMeter
from distill.data import Batch, BatchPlan, Dataset, Split
from distill.data.dataset import ResidentDataset
from distill.errors import Interrupted, RunFailed
from distill.evaluation import Classification
from distill.files.digests import state_digest
from distill.launching.processes import marking_process, on_main
from distill.launching.signals import StopRequest, deferred
from distill.recipe import Recipe
from distill.run import Run
from distill.students import Student, build_student
from distill.students.plain import train_on_cpu
from distill.teaching.cache import TeacherCache, open_cache
from distill.teaching.source import Frozen, SourceContext, StepIndex, TeacherSource
from distill.tracking import Tracking
from distill.training.accumulator import MetricAccumulator
from distill.training.compilation import Compilation
from distill.training.nonfinite import Ema, NonFiniteSteps
from distill.training.optim import build_optimizer, learning_rate, set_learning_rate
from distill.training.saving import Progress, TrainState, restore, save, settle
from distill.training.shares import GradientShares
from distill.training.task import build_task
from teachers import Teacher

LOADER_BOUND = 0.1
"""Share of the time spent waiting for a stream, above which the log says so."""
_log = logging.getLogger("distill")


class Trainer:
    """Everything of one training run that lives in memory."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, dataset: Dataset, teacher: Teacher | None) -> None:
        """Build student, optimizer and schedule.

        Raises:
            InputError: the student cannot be built, or the batch does not divide.
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
        self.plan.check(info.sizes["train"], dataset.augmenter.paired)
        self.steps_per_epoch = self.plan.steps_per_epoch(info.sizes["train"])
        self.schedule_steps = train.epochs * self.steps_per_epoch
        self.total_steps = min(self.schedule_steps, train.max_steps or self.schedule_steps)
        self.student: Student = build_student(
            recipe.student,
            resolution=recipe.data.resolution,
            num_classes=info.num_classes,
            channels=info.channels,
            mean=info.mean,
            std=info.std,
            seed=recipe.seed,
        )
        # Faster for convolutions, on a CPU too; a plain ViT has only its patch projection to gain.
        self.student.to(memory_format=torch.channels_last)
        self.student.to(accelerator.device)
        train_on_cpu(self.student)
        self.initial_weights = state_digest(self.student.state_dict())
        if train.gradient_checkpointing:
            self.student.checkpoint_gradients()
        self.ema = ModelEmaV3(self.student, decay=train.ema, use_warmup=True) if train.ema else None
        self.compilation = Compilation(train, accelerator.device)
        self.compilation.apply(self.student)
        self.compilation.apply_to_augmentation(dataset.augmenter)
        self.source = self._source() if recipe.distill else None
        self.task = build_task(recipe, self.student, self.source, num_classes=info.num_classes)
        self.task.methods.to(accelerator.device)
        dataset.give_views(self.task.views)
        self.optimizer = accelerator.prepare(build_optimizer(recipe.optim, self.student.model, self.task.methods))
        self.model: nn.Module = accelerator.prepare(self.task)
        self.nonfinite = NonFiniteSteps(accelerator, self.model, self.task, self.optimizer)
        self.average = None if self.ema is None else Ema(self.ema, self.student)
        self.progress = Progress()
        self.saved = Progress()
        self.accumulator = MetricAccumulator(accelerator)
        self.energy = EnergyMeter(accelerator.device)
        self.loader_bound = False
        self.shares = GradientShares(train, accelerator, self.student)
        self.evaluator = Classification(dataset, accelerator, batch_size=self.plan.micro_batch)

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
            context = SourceContext(self.student, self.accelerator, self.total_steps)
            source: TeacherSource = registry.find("teachers", options.source).implementation.build(options, context)
            return source
        return None

    @property
    def cache(self) -> TeacherCache | None:
        return self.source.cache if isinstance(self.source, Frozen) else None

    def open_cache(self) -> None:
        """Look for the teacher's stored logits, where the recipe wants them; nothing is written yet. Collective.

        Raises:
            InputError: the disk has no room for them.
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
        """At the end of an epoch, or of the run."""
        return self.progress.step == self.total_steps or self.progress.step % self.steps_per_epoch == 0

    @property
    def selection_split(self) -> Split | None:
        """The split on which checkpoints are chosen; None where nothing is held out: then the last one is taken."""
        if self.recipe.data.select_on == "test":
            return "test"
        return "validation" if self.dataset.info.sizes.get("validation") else None

    def fit(self, tracking: Tracking, stop: StopRequest) -> None:
        """Train to the end, with checkpoints and evaluations along the way.

        Raises:
            Interrupted: asked to stop; there is a checkpoint to resume from.
            RunFailed: too many steps in a row were not finite.
        """
        train, progress, run, display = self.recipe.train, self.progress, tracking.run, tracking.display
        with display, deferred():
            display.advance(progress.step)
            if self.at_boundary and progress.evaluated_at < progress.step:
                self.evaluate(tracking)  # the run was stopped between an epoch's last step and its evaluation
            self.accumulator.start_clock()
            unmixed = self.recipe.data.augment.mix_off_epoch
            if self.dataset.augmenter.paired and unmixed * self.steps_per_epoch >= self.total_steps:
                _log.warning("data.augment.mix_off_epoch: epoch %d never comes; all images are mixed", unmixed)
            while progress.step < self.total_steps:
                epoch, first_step = divmod(progress.step, self.steps_per_epoch)
                self.model.train()
                batches = self.dataset.training_batches(self.plan, epoch, first_step)
                if epoch == unmixed:
                    self.accumulator.await_compilation()
                for micro_batches in self.accumulator.timed(marking_process(batches)):
                    if progress.step % self.steps_per_epoch == 0:
                        # The first sample of the global batch: whatever the number of processes, it is there.
                        first = micro_batches[0].first()
                        run.log("epoch", step=progress.step, epoch=epoch, batch=first.digest())
                    self.train_step(micro_batches)
                    progress.step += 1
                    display.advance(progress.step)
                    if progress.step % train.log_every == 0:
                        self.log(tracking)
                    if (reason := stop.reason()) is not None:
                        self.save(run)
                        raise Interrupted(reason)
                    if self.at_boundary:
                        break
                    if train.checkpoint_every and progress.step % train.checkpoint_every == 0:
                        with self.accumulator.paused():
                            self.save(run)
                with self.accumulator.paused():
                    self.evaluate_or_save(tracking)
                    if self.due() or progress.step == self.total_steps:
                        self.save(run)

    def evaluate_or_save(self, tracking: Tracking) -> None:
        """Evaluate; if that is interrupted, save the weights that are to be evaluated anew."""
        run = tracking.run
        before, size = replace(self.progress), run.metrics.size
        try:
            self.evaluate(tracking)
        except Interrupted:
            self.progress = before
            run.cut_metrics(size)
            self.save(run)
            raise

    def due(self) -> bool:
        """Whether the end of this epoch gets a checkpoint: by the interval, or because it is the best so far."""
        every = self.recipe.train.checkpoint_every
        return every is None or self.progress.step % every == 0 or self.progress.best_step == self.progress.step

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step on this process's share of the global batch."""
        recipe, step = self.recipe, self.progress.step
        rate = learning_rate(recipe.optim, step, steps_per_epoch=self.steps_per_epoch, total_steps=self.schedule_steps)
        set_learning_rate(self.optimizer, rate)
        progress = step / self.schedule_steps
        self.compilation.begin_step()
        self.nonfinite.begin_step()
        losses = []
        for index, batch in enumerate(micro_batches):
            # What the model draws (drop path) is a function of where we are, so that a resumed run draws the same.
            torch.manual_seed(_seed_of(recipe.seed, step, self.accelerator.process_index, index))
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                shares_due = self.shares.due(step, index)
                with self.shares.forward_pass(shares_due):
                    loss, parts = self.model(batch, StepIndex(step, index), progress)
                if shares_due:
                    self.shares.measure(parts, self.task.weights(progress))
                self.accelerator.backward(loss / len(micro_batches))
            self.accumulator.add(loss, {name: part.detach() for name, part in parts.items()})
            losses.append(loss.detach())
        norm = self.nonfinite.judge(step, losses, [batch.indices for batch in micro_batches])
        if (limit := recipe.optim.clip_grad) is not None:
            if self.accelerator.scaler is None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
            else:  # the norm is that of scaled gradients
                self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        # Optimizers that draw, such as timm's Kron, draw the same on all processes.
        torch.manual_seed(_seed_of(recipe.seed, step))
        self.nonfinite.step()
        self.optimizer.zero_grad()
        self.task.after_step(step, self.nonfinite.skipped)
        if self.average is not None:
            self.average.update(step, self.nonfinite.skipped)
        self.accumulator.step(self.nonfinite.skipped)

    def inspect(self) -> None:
        """Fetch the skipped-step flags from the device; synchronises.

        Raises:
            RunFailed: too many steps in a row were not finite.
        """
        self.accumulator.skipped += self.nonfinite.read(self.recipe.train.max_bad_steps)

    def log(self, tracking: Tracking) -> None:
        """Report the global means since the last time."""
        self.inspect()
        values = self.accumulator.read(self.plan.batch_size) | self.energy.take() | self.shares.read()
        weights = self.recipe.loss_weights((self.progress.step - 1) / self.schedule_steps)
        values |= {f"weight/{name}": weights[name] for name in self.recipe.scheduled}
        if (cache := self.cache) is not None:
            values["teacher_cache/hits"] = cache.take_hits()
            cache.flush()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0].get("lr_scale", 1.0)
        tracking.training(self.progress.step, self.epoch, values | {"lr": rate})
        streamed = not isinstance(self.dataset, ResidentDataset)
        if streamed and not self.loader_bound and values["data_wait"] > LOADER_BOUND:
            self.loader_bound = True
            _log.warning(
                "step %d: %.0f %% of the time since the last line was spent waiting for data; with cores to spare, "
                "raise data.workers",
                self.progress.step, 100 * values["data_wait"],
            )  # fmt: skip

    def evaluate(self, tracking: Tracking) -> None:
        """Measure raw and averaged weights on the split that selects, and remember the best so far."""
        self.inspect()
        split, progress = self.selection_split, self.progress
        progress.evaluated_at = progress.step
        if split is None:
            return
        candidates = {"raw": self.student} if self.ema is None else {"raw": self.student, "ema": self.ema.module}
        for weights, student in candidates.items():
            # Each process has batch statistics of its own shard; the main one's are saved, so they are what is
            # measured.
            for buffer in student.buffers():
                broadcast(buffer)
            values = self.evaluator(student, split)
            tracking.evaluation(progress.step, self.epoch, split, weights, values)
            if (primary := values[self.evaluator.primary]) > progress.best_top1:
                progress.best_top1, progress.best_step, progress.best_weights = primary, progress.step, weights

    @property
    def state(self) -> TrainState:
        keep = self.recipe.train.keep_checkpoints
        return TrainState(
            self.student, self.task.methods, self.source, self.ema, self.optimizer, self.accelerator.scaler, keep
        )

    def save(self, run: Run) -> None:
        """Write a checkpoint; returns on all processes when it stands, or after a warning that it does not: the next
        one may find room.

        Raises:
            RunFailed: it would have been the last one.
        """
        self.inspect()
        metrics = self.accumulator.state()
        if self.cache is not None:
            self.cache.flush()
        problem = on_main(lambda: save(self.state, self.progress, run, epoch=self.epoch, also={"metrics": metrics}))
        if problem is None:
            self.saved = replace(self.progress)
            return
        step = self.progress.step
        if step == self.total_steps:
            raise RunFailed(problem)
        _log.warning("%s Training goes on; older checkpoints are intact, and the next one is tried in turn.", problem)
        if self.progress.best_step == step:  # its weights are lost with the next step
            self.progress.take_best_of(self.saved)

    def restore(self, folder: Path, run: Run) -> None:
        """Continue from a checkpoint, verified before anything changes."""
        self.progress, state = restore(self.state, folder, run)
        self.saved = replace(self.progress)
        self.accumulator.resume(state["metrics"])
        on_main(lambda: settle(self.state, folder, self.progress, run, epoch=self.epoch))
        _log.info("resumed from %s", folder)


def _seed_of(*where: int) -> int:
    text = "/".join(map(str, where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
