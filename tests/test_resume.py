"""A run that is stopped or killed goes on to the very weights that it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill import checkpoint, run
from distill.pipeline import Launch, execute, locate
from distill.recipe import Recipe, from_mapping
from distill.signals import Interrupted
from tests.conftest import Toy, environment

TOTAL_STEPS = 18  # 96 training images in batches of 16 for 3 epochs


class StopAfter:
    """A stop request that comes after a given number of steps of this launch."""

    def __init__(self, steps: int | None) -> None:
        self.left = steps

    def reason(self) -> str | None:
        if self.left is None:
            return None
        self.left -= 1
        return "test" if self.left == 0 else None


def go(recipe: Recipe, out: Path, steps: int | None, resume: str | None = None) -> None:
    execute(recipe, locate(recipe, out, resume), Launch(StopAfter(steps), threads=1))  # type: ignore[arg-type]


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


# In the first epoch, at an epoch's last step, just after one, and at the very last step, with EMA, drop path, mixup and
# accumulation on.
@pytest.mark.parametrize("stops", [(1,), (4, 3), (6,), (7, 5), (18,)])
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
    place = locate(recipe, None, str(first))
    execute(recipe, place, Launch(StopAfter(None), threads=1))  # type: ignore[arg-type]
    same_end(undisturbed, out)


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
