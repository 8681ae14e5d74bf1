"""Logs the events of a run to metrics.jsonl, status.json, the console, TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from distill.console import TrainingDisplay
from distill.recipe import Recipe
from distill.run import Run


class Tracking:
    """Logs the events of one run; called on every process, written by the main one.

    Trackers get every line of metrics.jsonl: training under the same keys, evaluations with the prefix `raw/` or `ema/`
    (the weights), those of the exported weights with `test/`, other events with their name.
    """

    def __init__(
        self, run: Run, recipe: Recipe, accelerator: Accelerator, *, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.run, self._recipe, self._accelerator = run, recipe, accelerator
        self.display = TrainingDisplay(
            recipe.name, total_steps=total_steps, steps_per_epoch=steps_per_epoch, is_main=run.is_main
        )
        self._step, self._evaluated = 0, ""
        run.listeners.append(self._track)

    def start(self) -> None:
        """Start the recipe's trackers, with the recipe as configuration."""
        config = {key: str(value) for key, value in self._recipe.flat().items()}
        self._accelerator.init_trackers(self._recipe.name, config=config)

    def close(self) -> None:
        """Finish the trackers; `Accelerator.end_training` would also destroy the process group."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

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
        self.display.accuracy(f"epoch {epoch:.2f}  {split} top-1 {values['student/top1']:.2f} % ({weights} weights)")

    def _track(self, line: Mapping[str, Any]) -> None:
        values = {key: value for key, value in line.items() if key not in ("event", "step", "epoch", "time")}
        if line["event"] != "train":
            prefix = self._evaluated if line["event"] == "eval" else line["event"]
            values = {f"{prefix}/{key}": value for key, value in values.items()}
        # W&B drops values of earlier steps than its last one; the test evaluation may be of an earlier step.
        self._step = max(self._step, line["step"])
        self._accelerator.log({**values, "epoch": line["epoch"]}, step=self._step)
