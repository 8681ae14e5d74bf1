"""TensorBoard and W&B over resumed runs and runs with a control."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import accelerate.utils
import pytest
from accelerate.utils import LoggerType

import distill.exports.folder
from distill import run
from distill.errors import Interrupted
from distill.recipe import Recipe, from_mapping
from tests.conftest import Toy
from tests.test_resume import go


@pytest.fixture(autouse=True)
def without_the_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


def recipe_of(toy: Toy, tracker: str, *, control: bool = False, **changes: Any) -> Recipe:
    """Two epochs of six steps; without a teacher if there is no control."""
    train = {"epochs": 2, "gradient_accumulation": 1, "trackers": [tracker]}
    taught = {"control": True} if control else {"teacher": None, "distill": []}
    return from_mapping(toy.mapping(train=train) | taught | changes, default_name="toy")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stop", "resume"), [(9, "checkpoints/step_00000006"), (6, ""), (None, "nothing saved")])
def test_tensorboard_has_each_step_once_after_a_resume(
    stop: int | None, resume: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the last step; between the last step of an epoch and its evaluation; from the beginning."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, out = recipe_of(toy, "tensorboard"), tmp_path / "run"
    if stop is None:
        with monkeypatch.context() as patch:
            patch.setattr("distill.trainer.Trainer.evaluate", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                go(recipe, out, None)
    else:
        with pytest.raises(Interrupted):
            go(recipe, out, stop)
    # TensorBoard reads event files in the order of their names: the second, then a counter that is compared as text.
    time.sleep(1)
    go(recipe, out, None, resume=out / resume if stop is not None else out)
    (folder,) = {path.parent for path in (out / "toy").glob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    lines = lines_of(out)
    for key in ("loss", "lr", "images_per_second"):
        found = [(event.step, pytest.approx(event.value)) for event in events.Scalars(key)]
        assert found == [(line["step"], line[key]) for line in lines if line["event"] == "train"]
    for weights in ("raw", "ema"):
        chosen = [line for line in lines if line.get("weights") == weights and line.get("split") == "validation"]
        found = [(event.step, pytest.approx(event.value)) for event in events.Scalars(f"{weights}/student/nll")]
        assert found == [(line["step"], line["student/nll"]) for line in chosen]
        assert [line["step"] for line in chosen] == [6, 12]


class Wandb(ModuleType):
    """Behaves like W&B: a second `init` returns the run that is still open, and a known id continues its run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[str] = []
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.codes: list[int] = []
        self.config, self.active = self, False

    def init(self, project: str, id: str | None = None, resume: str | None = None) -> Wandb:
        if not self.active:
            assert id is not None
            assert resume == "allow"
            self.active, self.current = True, self.metrics.setdefault(id, [])
            self.calls.append(id)
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        assert self.active
        self.current.append({"step": step, **values})

    def finish(self, exit_code: int = 0) -> None:
        self.active = False
        self.calls.append("finished")
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    return module


def test_wandb_has_a_run_for_the_student_and_one_for_the_control(toy: Toy, tmp_path: Path, wandb: Wandb) -> None:
    out = tmp_path / "run"
    go(recipe_of(toy, "wandb", control=True), out, None)
    student, control = run.read_status(out)["wandb"], run.read_status(out / "control")["wandb"]
    assert student != control
    assert wandb.calls == [student, "finished", control, "finished", student, "finished"]
    assert wandb.codes == [0, 0, 0]
    for identity, path in ((student, out), (control, out / "control")):
        losses = [(line["step"], line["loss"]) for line in wandb.metrics[identity] if "loss" in line]
        assert losses == [(line["step"], line["loss"]) for line in lines_of(path) if line["event"] == "train"]
        assert len(losses) == 12
        assert sum("test/student/top1" in line for line in wandb.metrics[identity]) == 1
    assert any("control/initial_weights" in line for line in wandb.metrics[student])


def test_a_resumed_run_continues_its_wandb_run(toy: Toy, tmp_path: Path, wandb: Wandb) -> None:
    recipe, out = recipe_of(toy, "wandb"), tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 4)
    go(recipe, out, None, resume=out)
    (identity,) = wandb.metrics
    assert wandb.calls == [identity, "finished"] * 2
    assert wandb.codes == [1, 0], "the first was not finished"
    assert [line["step"] for line in wandb.metrics[identity] if "loss" in line] == list(range(1, 13))
