"""Where the events of a run go: one call each, to metrics.jsonl, status.json, the console, TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from distill.console import TrainingDisplay
from distill.recipe import Recipe
from distill.run import Run


class Tracking:
    """The events of one run. Every process calls; the main one writes.

    Trackers get every line of metrics.jsonl: of training under the same keys, of an evaluation under `raw/` or `ema/`
    (the weights), of the exported weights under `test/`, of any other event under its name.
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
        """Start the recipe's trackers, which get the recipe as their configuration."""
        config = {key: str(value) for key, value in self._recipe.flat().items()}
        self._accelerator.init_trackers(self._recipe.name, config=config)

    def close(self) -> None:
        """Finish the trackers; `Accelerator.end_training` would end the process group too, which other runs need."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def training(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Means since the last such line, after `step` steps."""
        self.run.log("train", step=step, epoch=epoch, **values)
        self.run.status(step=step, epoch=epoch, metrics=dict(values))
        self.display.show(step, values)

    def evaluation(self, step: int, epoch: float, split: str, weights: str, values: Mapping[str, float]) -> None:
        """Accuracies of the 'raw' or 'ema' weights after `step` steps, on the split that selects."""
        self._evaluation(weights, step, epoch, split, weights, values)

    def test(self, step: int, epoch: float, weights: str, values: Mapping[str, float]) -> None:
        """Accuracies of the exported weights, which are those after `step` steps, on the test set."""
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
        # W&B drops what comes with a step before its last one; the test set is read last, for the best step.
        self._step = max(self._step, line["step"])
        self._accelerator.log({**values, "epoch": line["epoch"]}, step=self._step)
