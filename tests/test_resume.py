"""A run that is stopped or killed goes on to the very weights that it would have had."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import pytest
import torch

import distill
from distill import checkpoint, pipeline, run
from distill.errors import InputError, Interrupted, RunFailed
from distill.files.digests import state_digest
from distill.finishing import check_control
from distill.recipe import Recipe, from_mapping
from distill.resumption import RunLocation, check_teacher
from distill.students import build_student
from distill.trainer import Trainer
from distill.training.task import Losses, Task
from tests.conftest import Counted, Toy, environment
from tests.students.helpers import KINDS
from tests.warm import launch

TOTAL_STEPS = 18  # 96 training images in batches of 16 for 3 epochs


class Asked(Protocol):
    """Asked after each step why to stop."""

    def reason(self) -> str | None: ...


class StopAfter:
    """A stop request that comes after a given number of steps of this launch."""

    def __init__(self, steps: int | None) -> None:
        self.left = steps

    def reason(self) -> str | None:
        if self.left is None:
            return None
        self.left -= 1
        return "test" if self.left == 0 else None


def go(recipe: Recipe, out: Path, steps: int | Asked | None, resume: str | Path | None = None) -> None:
    """`distill.train` without a report and without the fresh process that loads its export, stopped after so many steps
    (None: not at all), or as `steps` says.
    """
    fit, asked = Trainer.fit, steps if hasattr(steps, "reason") else StopAfter(steps)
    with (
        patch.object(Trainer, "fit", lambda trainer, tracking, _: fit(trainer, tracking, asked)),  # type: ignore[arg-type]
        patch.object(pipeline, "report_on", lambda _: None),
        patch.object(distill.exports.folder, "_compare_with_reloaded", lambda *args: None),
    ):
        distill.train(recipe, out=None if resume and resume != "auto" else out, resume=resume)


def train_lines(path: Path) -> list[dict[str, float]]:
    timing = ("time", "images_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in timing} for line in run.read_metrics(path, "train")]


def same_end(one: Path, other: Path) -> None:
    last = [path / "checkpoints" / "last" for path in (one, other)]
    assert last[0].resolve().name == last[1].resolve().name == f"step_{TOTAL_STEPS:08d}"
    for stem in ("model", "ema"):
        states = [checkpoint.read_tensors(path, stem) for path in last]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), stem
    moments = [checkpoint.read_optimizer(path)["state"] for path in last]
    for key, values in moments[0].items():
        assert all(
            torch.equal(torch.as_tensor(values[name]), torch.as_tensor(moments[1][key][name])) for name in values
        )
    assert train_lines(one) == train_lines(other)
    evaluations = [[line["student/top1"] for line in run.read_metrics(path, "eval")] for path in (one, other)]
    assert evaluations[0] == evaluations[1]
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (one, other)]
    assert exports[0] == exports[1]


@pytest.fixture(scope="module")
def recipe(toy: Toy) -> Recipe:
    return from_mapping(toy.mapping(), default_name="toy")


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    go(recipe, out, None)
    assert run.read_status(out)["state"] == "finished"
    return out


# At an epoch's last step, just after one, and at the very last step.
@pytest.mark.parametrize("stops", [(6, 1), (18,)])
def test_a_stopped_run_resumes_bit_for_bit(
    recipe: Recipe, undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    out = tmp_path / "run"
    for index, steps in enumerate(stops):
        with pytest.raises(Interrupted):
            go(recipe, out, steps, resume="auto" if index else None)
        assert run.read_status(out)["state"] == "interrupted"
        assert run.read_status(out)["step"] == sum(stops[: index + 1])
    go(recipe, out, None, resume="auto")
    assert run.read_status(out)["state"] == "finished"
    same_end(undisturbed, out)


@pytest.mark.parametrize("kind", ["refiner, shared", "performer", "focal"])
def test_students_of_other_kinds_resume_bit_for_bit(toy: Toy, tmp_path: Path, kind: str) -> None:
    """With batch statistics, or random features that are drawn anew after every third forward pass."""
    student = {"attention": KINDS[kind] | ({"window": 2} if kind == "focal" else {})}
    short = {"epochs": 1, "max_steps": 5}
    recipe = from_mapping(toy.mapping(student=student, train=short, teacher=None, distill=[]), default_name="toy")
    ends, outs = [], [tmp_path / "whole", tmp_path / "parts"]
    go(recipe, outs[0], None)
    for steps in (2, 1, None):
        with nullcontext() if steps is None else pytest.raises(Interrupted):
            go(recipe, outs[1], steps, resume="auto")
    for out in outs:
        states = [checkpoint.read_tensors(out / "checkpoints" / "last", stem) for stem in ("model", "ema")]
        ends.append([(key, tensor) for state in states for key, tensor in state.items()])
    for (key, one), (other_key, other) in zip(*ends, strict=True):
        assert key == other_key
        assert torch.equal(one, other), key
    last = dict(ends[0][: len(ends[0]) // 2])
    if kind == "performer":
        averaged = dict(ends[0][len(ends[0]) // 2 :])
        attention = "model.blocks.0.attn"
        assert last[f"{attention}.passes"] == 10, "two micro-batches in each of five steps"
        first = build_student(recipe.student, resolution=8, num_classes=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3,
                              seed=recipe.seed).state_dict()  # fmt: skip
        assert torch.equal(last[f"{attention}.seed"], first[f"{attention}.seed"])
        assert not torch.equal(last[f"{attention}.features"], first[f"{attention}.features"])
        assert torch.equal(last[f"{attention}.features"], averaged[f"{attention}.features"]), "copied, not averaged"
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in outs]
    assert exports[0] == exports[1]


def trace() -> None:
    """Note all of this process's state after each step; and where `interruptions` says so, send it a real signal: in
    the accumulation group, or at its end.
    """
    rank = int(os.environ.get("RANK", "0"))
    file = Path("interruptions")
    interruptions = file.read_text().splitlines() if file.exists() else []
    train_step, forward = Trainer.train_step, Task.forward
    now = {"step": -1, "micro-batch": 0}

    def interrupt() -> None:
        if f"{now['step']} {now['micro-batch']} {rank}" in interruptions:
            os.kill(os.getpid(), signal.SIGTERM)

    def losses(*args: Any, **kwargs: Any) -> Losses:
        interrupt()
        now["micro-batch"] += 1
        return forward(*args, **kwargs)

    def step(trainer: Trainer, micro_batches: Any) -> None:
        now.update({"step": trainer.progress.step, "micro-batch": 0})
        train_step(trainer, micro_batches)
        with Path(f"trace-{rank}").open("a") as notes:
            notes.write(f"{trainer.progress.step} {digest_of(trainer)}\n")
        interrupt()

    Trainer.train_step, Task.forward = step, losses  # type: ignore[method-assign]


def digest_of(trainer: Trainer) -> str:
    """SHA-256 (hex) of weights, moving average and the optimizer's state."""
    assert trainer.ema is not None
    moments = {
        f"{key}.{name}": torch.as_tensor(value)
        for key, values in trainer.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    states = (trainer.student.state_dict(), trainer.ema.module.state_dict(), moments)
    return " ".join(state_digest(state) for state in states)


def traces(folder: Path, processes: int) -> list[dict[str, str]]:
    """For each process, step -> digest; a step that was done twice has to come to the same."""
    found = []
    for rank in range(processes):
        lines = (folder / f"trace-{rank}").read_text().splitlines()
        found.append(dict(line.split(" ", 1) for line in lines))
        assert len(set(lines)) == len(found[-1]), "a step came to something else when it was done again"
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("processes", "number", "apart"),
    [
        (1, 3, (1, 3)),
        pytest.param(1, 20, (10, 14), marks=pytest.mark.soak),
        pytest.param(2, 20, (10, 14), marks=pytest.mark.soak),
    ],
    ids=["3", "20", "20 of two processes"],
)
def test_signals_change_nothing(
    toy: Toy, tmp_path: Path, counted: Counted, processes: int, number: int, apart: tuple[int, int]
) -> None:
    """Interrupted so often, so many steps apart; with EMA, mixup, CutMix, drop path and accumulation on."""
    chance, at, stops = random.Random(0), 0, []
    for index in range(number):
        at += chance.randint(*apart)
        at += (5 - at) % 6 if index % 4 == 3 else 0  # every fourth at an epoch's last step
        stops.append((at, index % 3, chance.randrange(processes)))  # micro-batch 0, 1, or after the last
    steps = at + max(apart) + 1
    command = ["train", toy.recipe, f"train.epochs={steps // 6 + 1}", f"train.max_steps={steps}", "train.log_every=3",
               "train.keep_checkpoints=2", "--out", "run", "--resume", "auto"]  # fmt: skip
    folders = [tmp_path / "undisturbed", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    done = launch(command, cwd=folders[0], processes=processes, before=trace)
    assert done.wait(600) == [0] * processes, done.output
    for index, (step, micro_batch, rank) in enumerate(stops):
        (folders[1] / "interruptions").write_text(f"{step} {micro_batch} {rank}")
        launched = launch(command, cwd=folders[1], processes=processes, before=trace)
        assert launched.wait() == [75] * processes, launched.output
        status = run.read_status(folders[1] / "run")
        assert (status["state"], status["step"]) == ("interrupted", step + 1), index
    (folders[1] / "interruptions").unlink()
    launched = launch(command, cwd=folders[1], processes=processes, before=trace)
    assert launched.wait() == [0] * processes, launched.output

    expected, found = (traces(folder, processes) for folder in folders)
    losses = [{line["step"]: line for line in train_lines(folder / "run")} for folder in folders]
    assert losses[0].keys() == losses[1].keys()
    equal = 0
    for step, *_ in stops:
        following = range(step + 1, min(step + 11, steps))
        same_states = all(a[str(at)] == b[str(at)] for a, b in zip(expected, found, strict=True) for at in following)
        equal += same_states and all(losses[0].get(at + 1) == losses[1].get(at + 1) for at in following)
    assert found == expected
    exports = [(folder / "run" / "export" / "model.safetensors").read_bytes() for folder in folders]
    assert exports[0] == exports[1]
    counted(f"resumed exactly, {processes} process(es)", done=equal, of=number)


@pytest.mark.soak
def test_another_number_of_processes(toy: Toy, tmp_path: Path, counted: Counted) -> None:
    """Exact to rounding where drop path is 0: it draws on each process for itself."""
    command = ["train", toy.recipe, "student.drop_path=0", "train.batch_size=24", "train.epochs=20",
               "train.max_steps=40", "--resume", "auto", "--out"]  # fmt: skip
    one = launch([*command, "one"], cwd=tmp_path)
    assert one.wait() == [0], one.output
    for index, processes in enumerate((1, 2, 3)):
        if index < 2:
            (tmp_path / "interruptions").write_text(f"{13 * index + 8} 1 0")
        launched = launch([*command, "many"], cwd=tmp_path, processes=processes, before=trace)
        assert launched.wait() == [75 if index < 2 else 0] * processes, launched.output
        (tmp_path / "interruptions").unlink(missing_ok=True)
    lines = [train_lines(tmp_path / name) for name in ("one", "many")]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(*lines, strict=True)]
    within = sum(gap <= 1e-5 for gap in gaps)
    counted("losses after going on with 2 and 3 processes", done=within, of=40, difference=max(gaps))


def test_resuming_from_an_older_checkpoint_and_from_behind_a_damaged_one(
    recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 14)
    (out / "checkpoints" / "step_00000014" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Interrupted):
        go(recipe, out, 1, resume="auto")
    assert [path.name for path in checkpoint.existing(out / "checkpoints")] == [
        "step_00000006", "step_00000012", "step_00000013",
    ]  # fmt: skip
    first = out / "checkpoints" / "step_00000006"
    go(recipe, out, None, resume=first)
    same_end(undisturbed, out)


@pytest.mark.soak
def test_a_killed_command_goes_on_with_resume_auto(toy: Toy, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.train", str(toy.recipe), "--out", str(out), "--resume", "auto"]
    threads = {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(**threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 100
    while not any(line["step"] >= 8 for line in run.read_metrics(out, "train")):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.read_status(out)["state"] == "running"  # nobody was left to write otherwise
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment(**threads), capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    last = checkpoint.read_tensors(out / "checkpoints" / "last", "model")
    expected = checkpoint.read_tensors(undisturbed / "checkpoints" / "last", "model")
    assert last.keys() == expected.keys()
    # The command uses all cores and the reference one thread: sums differ in their last bits, and 18 steps amplify
    # that.
    assert all(torch.allclose(last[key], expected[key], atol=1e-3) for key in last)


def test_a_control_starts_and_sees_what_the_student_did_and_is_resumed(toy: Toy, tmp_path: Path) -> None:
    recipe = from_mapping(toy.mapping(control=True, train={"epochs": 1, "max_steps": 5}), default_name="toy")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 7)  # 5 steps of the student, 2 of the control
    assert run.read_status(out)["state"] == run.read_status(out / "control")["state"] == "interrupted"
    before = (out / "predictions.safetensors").stat().st_mtime_ns
    go(recipe, out, None, resume="auto")
    assert (out / "predictions.safetensors").stat().st_mtime_ns == before  # the student was done
    assert run.read_status(out)["state"] == run.read_status(out / "control")["state"] == "finished"
    (check,) = run.read_metrics(out, "control")
    assert check["equal_batches"] == 1
    control = run.read_recipe(out / "control")
    assert (control.teacher, control.distill, control.label_weight) == (None, [], 1.0)


def test_a_resumed_run_keeps_its_teacher(tmp_path: Path) -> None:
    """Which its recipe may train into another folder, once the precision or that recipe has changed."""
    status = {"state": "interrupted", "teacher_weights": {"runs/teachers/cnn-1/export/model.safetensors": "1" * 64}}
    (tmp_path / "status.json").write_text(json.dumps(status))
    resumed = RunLocation(tmp_path, resumed=True)
    check_teacher(resumed, {"moved/model.safetensors": "1" * 64})
    check_teacher(RunLocation(tmp_path), {"runs/teachers/cnn-2/export/model.safetensors": "2" * 64})
    with pytest.raises(InputError, match=r"cnn-2/export/model\.safetensors: these teacher weights are not those that"):
        check_teacher(resumed, {"runs/teachers/cnn-2/export/model.safetensors": "2" * 64})


@pytest.mark.parametrize(
    ("devices", "batches", "equal"),
    [("cc", "xx", True), ("cc", "xy", False), ("cg", "xy", True)],  # devices round augmented pixels differently
)
def test_student_and_control_have_seen_the_same_batches(
    tmp_path: Path, devices: str, batches: str, equal: bool
) -> None:
    for folder, device, batch in zip(("", "control"), devices, batches, strict=True):
        (tmp_path / folder).mkdir(exist_ok=True)
        at = {"step": 0, "epoch": 0, "time": 0.0}
        lines = [{"event": "start", **at, "initial_weights": "w"}, {"event": "epoch", **at, "batch": batch}]
        lines[1]["device"] = device
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged: list[tuple[str, dict[str, Any]]] = []
    tracking: Any = SimpleNamespace(run=SimpleNamespace(log=lambda event, **values: logged.append((event, values))))
    with nullcontext() if equal else pytest.raises(RunFailed, match="saw different batches"):
        check_control(tmp_path, tracking)
    assert len(logged) == equal
