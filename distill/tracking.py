"""Logs the events of a run to metrics.jsonl, status.json, the console, TensorBoard and W&B."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from distill.console import TrainingDisplay
from distill.files.metrics import read_lines
from distill.recipe import Recipe
from distill.run import Run, read_status

SHOWN = {"student/top1": "top-1", "student/knn": "k-NN", "student/linear": "linear probe"}
"""What the console says of an evaluation, by its name in metrics.jsonl."""


class Tracking:
    """Logs the events of one run; called on every process, written by the main one.

    Trackers get every line of metrics.jsonl: training under the same keys, evaluations with the prefix `raw/` or `ema/`
    (the weights), those of the exported weights with `test/`, other events with their name.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        total_steps: int,
        steps_per_epoch: int,
        stage: str,
        later_steps: int,
    ) -> None:
        """`stage` and `later_steps`: see `Stages`."""
        self.run, self._recipe, self._accelerator = run, recipe, accelerator
        self.display = TrainingDisplay(
            stage,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            is_main=run.is_main,
            later_steps=later_steps,
        )
        self._step, self._evaluated = 0, ""

    def start(self, resumed_at: int | None = None) -> None:
        """Start the recipe's trackers, with the recipe as configuration.

        Args:
            resumed_at: the step from which the run is resumed; None: it is new. `metrics.jsonl` ends there. TensorBoard
                discards what it has of later steps, and W&B continues the same run.
        """
        config = {key: str(value) for key, value in self._recipe.flat().items()}
        self._start({} if resumed_at is None else {"tensorboard": {"purge_step": resumed_at}}, config)
        if resumed_at is not None and self.run.is_main:
            self._log_again(resumed_at)

    def reopen(self) -> None:
        """Continue in the trackers after `close`."""
        self._start({}, None)

    def _start(self, options: dict[str, dict[str, Any]], config: dict[str, str] | None) -> None:
        if "wandb" in self._recipe.train.trackers and self.run.is_main:
            identity = read_status(self.run.path).get("wandb") or uuid.uuid4().hex[:8]
            self.run.status(wandb=identity)
            options = options | {"wandb": {"id": identity, "resume": "allow"}}
        self._accelerator.init_trackers(self._recipe.name, config=config, init_kwargs=options)
        self.run.listeners.append(self._track)

    def _log_again(self, step: int) -> None:
        """Give TensorBoard the lines that it has discarded though they stay: those of `step` itself."""
        trackers = [tracker for tracker in self._accelerator.trackers if tracker.name == "tensorboard"]
        for line in read_lines(self.run.metrics.path) if trackers else ():
            self._evaluated = line.get("weights", "")  # there is no test evaluation before the run's last checkpoint
            values = self._values(line)
            for tracker in trackers if self._step >= step else ():
                tracker.log(values, step=self._step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the trackers; `Accelerator.end_training` would also destroy the process group."""
        if self._track in self.run.listeners:
            self.run.listeners.remove(self._track)
        for tracker in self._accelerator.trackers:
            if failed and tracker.name == "wandb" and self.run.is_main:
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()
        self._accelerator.trackers = []

    def training(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Log means since the last such line, after `step` steps."""
        self.run.log("train", step=step, epoch=epoch, **values)
        self.run.status(step=step, epoch=epoch, metrics=dict(values))
        self.display.show(step, values)

    def evaluation(self, step: int, epoch: float, split: str, weights: str, values: Mapping[str, float]) -> None:
        """Log accuracies of the 'raw' or 'ema' weights after `step` steps, on the selection split."""
        self._evaluation(weights, step, epoch, split, weights, values)

    def test(self, step: int, epoch: float, weights: str, values: Mapping[str, float]) -> None:
        """Log test accuracies of the exported weights, those after `step` steps."""
        self._evaluation("test", step, epoch, "test", weights, values)

    def _evaluation(
        self, prefix: str, step: int, epoch: float, split: str, weights: str, values: Mapping[str, float]
    ) -> None:
        self._evaluated = prefix
        self.run.log("eval", step=step, epoch=epoch, split=split, weights=weights, **values)
        self.run.status(metrics=dict(values))
        names = {"student/macro": "macro", **SHOWN} if self._recipe.train.select == "macro" else SHOWN
        shown = [f"{name} {values[key]:.2f} %" for key, name in names.items() if key in values]
        newest = shown[0] if shown else ""
        self.display.accuracy(f"epoch {epoch:.2f}  {split} {', '.join(shown)} ({weights} weights)", newest)

    def _track(self, line: Mapping[str, Any]) -> None:
        values = self._values(line)
        self._accelerator.log(values, step=self._step)

    def _values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a line under the trackers' names; sets the step to log them at."""
        values = {key: value for key, value in line.items() if key not in ("event", "step", "epoch", "time")}
        if line["event"] != "train":
            prefix = self._evaluated if line["event"] == "eval" else line["event"]
            values = {f"{prefix}/{key}": value for key, value in values.items()}
        # W&B drops values of earlier steps than its last one; the test evaluation may be of an earlier step.
        self._step = max(self._step, line["step"])
        return {**values, "epoch": line["epoch"]}
