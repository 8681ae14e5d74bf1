"""Saving the training state of a run on a thread, and restoring it; links, pruning and status after a checkpoint."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distill import checkpoint
from distill.errors import InputError
from distill.files.durable import describe_failure
from distill.files.records import CheckpointState, check
from distill.launching.processes import on_main
from distill.recipe.reading import short
from distill.run import Run
from distill.teaching.source import TeacherSource

_log = logging.getLogger("distill")


@dataclass
class Progress:
    """Training progress in a checkpoint. There is no random state: randomness is a function of the step."""

    step: int = 0
    """Optimizer steps done."""
    evaluated_at: int = 0
    best_top1: float = -1.0
    best_step: int | None = None
    best_weights: str = "raw"
    """'raw' or 'ema', whichever was better on the selection split."""
    training_seconds: float = 0.0
    """Time of the steps, their data included; without the other two, and without checkpoints at the end of an epoch."""
    compilation_seconds: float = 0.0
    """Time of the first steps of each launch, if networks are compiled."""
    evaluation_seconds: float = 0.0
    """Time of the evaluations on the selection split."""

    def copy_best(self, other: Progress) -> None:
        """Replace the best so far by that of `other`."""
        self.best_top1, self.best_step, self.best_weights = other.best_top1, other.best_step, other.best_weights


@dataclass(frozen=True)
class TrainState:
    """All tensors of a run's checkpoint, and the number of checkpoints to keep."""

    student: nn.Module
    methods: nn.Module
    """Parameters and buffers of the losses."""
    source: TeacherSource | None
    ema: nn.Module | None
    """The student with averaged weights."""
    optimizer: AcceleratedOptimizer
    scaler: torch.amp.GradScaler | None
    keep: int
    """Number of newest checkpoints to keep; the best is kept too."""

    def states(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> state dict."""
        states = {"model": self.student.state_dict(), "methods": self.methods.state_dict()}
        if self.source is not None:
            states["teacher"] = dict(self.source.state_dict())
        if self.ema is not None:
            states["ema"] = self.ema.state_dict()
        return {stem: state for stem, state in states.items() if state}


class CheckpointWriter:
    """Writes checkpoints on a thread, from copies taken at their step, at most one at a time. On the main process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._record: Callable[[], object] = bool
        self._problem: str | None = None
        self._error: BaseException | None = None

    def start(
        self, train_state: TrainState, progress: Progress, run: Run, *, epoch: float, also: Mapping[str, Any]
    ) -> None:
        """Copy the state, and begin to write it; waits for the checkpoint before.

        Args:
            also: further plain data, returned by `restore`.
        """
        self.wait()
        folder, progress = checkpoint.folder_of_step(run.checkpoints, progress.step), replace(progress)
        tensors, optimizer = (
            tree_map_only(Tensor, _copy, values)
            for values in (train_state.states(), train_state.optimizer.state_dict())
        )
        # Logged before it is written: the order of the lines does not depend on how long that takes.
        run.log("checkpoint", step=progress.step, epoch=epoch, path=str(folder.relative_to(run.path)))
        state = {
            **also,
            "progress": asdict(progress),
            "metrics_size": run.metrics_size(),
            "scaler": None if train_state.scaler is None else train_state.scaler.state_dict(),
        }
        needed, free = checkpoint.size(tensors, optimizer), shutil.disk_usage(run.path).free
        if needed > free:  # only a hint: the estimate is rough
            _log.warning("%s: needs %s bytes, and %s are free", folder, f"{needed:,}", f"{free:,}")

        def write() -> None:
            try:
                checkpoint.write(folder, tensors, optimizer, state)
            except OSError as error:
                self._problem = describe_failure(folder, error, needed)
            except BaseException as error:
                self._error = error

        self._problem = self._error = None
        self._record = lambda: record_checkpoint(train_state, folder, progress, run, epoch=epoch)
        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def poll(self) -> None:
        """Record a checkpoint that has been written since the last call; an error waits for `wait`."""
        if self._thread is not None and not self._thread.is_alive():
            self.close()

    def wait(self) -> str | None:
        """Wait until the checkpoint is written, and record it; an error message if that failed."""
        self.close()
        if self._error is not None:
            raise self._error
        return self._problem

    def close(self) -> None:
        """Like `wait`, without errors."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._problem is None and self._error is None:
                self._record()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def restore(train_state: TrainState, folder: Path, run: Run) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint after verifying it; returns its progress and all of its plain data.

    Raises:
        InputError: it is damaged, or of another recipe.
    """
    checkpoint.verify(folder)
    state = checkpoint.read_state(folder)
    check(CheckpointState, state, str(folder / "state.json"))
    try:
        progress = TypeAdapter(Progress).validate_python(state["progress"])
        _load(train_state, folder, state)
    except InputError:
        raise
    except Exception as error:  # states of other shapes or without what they need can fail anywhere
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(
            f"{folder}: not a checkpoint of this recipe ({type(error).__name__}: {reason}). Use another one, or start "
            "a new run with another --out."
        ) from error
    if problem := on_main(lambda: _damage_of_best(run.checkpoints, progress)):
        _log.warning(
            "%s: the best checkpoint so far is missing or damaged (%s); selection starts over", folder, problem
        )
        progress.copy_best(Progress())
        progress.evaluated_at = 0
    run.cut_metrics(state["metrics_size"])
    return progress, state


def _load(train_state: TrainState, folder: Path, state: Mapping[str, Any]) -> None:
    """Load the tensors of a verified checkpoint."""
    train_state.student.load_state_dict(checkpoint.read_tensors(folder, "model"))
    if train_state.methods.state_dict():
        train_state.methods.load_state_dict(checkpoint.read_tensors(folder, "methods"))
    if train_state.source is not None and train_state.source.state_dict():
        train_state.source.load_state_dict(checkpoint.read_tensors(folder, "teacher"))
    if train_state.ema is not None:
        train_state.ema.load_state_dict(checkpoint.read_tensors(folder, "ema"))
    train_state.optimizer.load_state_dict(checkpoint.read_optimizer(folder))
    if train_state.scaler is not None and state["scaler"] is not None:
        train_state.scaler.load_state_dict(state["scaler"])


def record_checkpoint(train_state: TrainState, folder: Path, progress: Progress, run: Run, *, epoch: float) -> None:
    """Update links and status for the checkpoint at `folder`, and prune older ones; on the main process.

    Also called on resume, since the previous process may have been killed before it.
    """
    best = None if progress.best_step is None else checkpoint.folder_of_step(run.checkpoints, progress.best_step)
    try:
        checkpoint.set_link(run.checkpoints, "last", folder)
        if best is not None:
            checkpoint.set_link(run.checkpoints, "best", best)
    except OSError as error:
        _log.warning("%s: cannot create the links: %s", run.checkpoints, error.strerror)
    checkpoint.prune(run.checkpoints, train_state.keep)
    run.status(step=progress.step, epoch=epoch)


def _damage_of_best(checkpoints: Path, progress: Progress) -> str | None:
    if progress.best_step in (None, progress.step):
        return None
    try:
        checkpoint.verify(checkpoint.folder_of_step(checkpoints, progress.best_step))
    except InputError as damage:
        return str(damage)
    return None
