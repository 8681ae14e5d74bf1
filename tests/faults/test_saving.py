"""Runs that are killed while they save: there is always a checkpoint to go on from, and they end like the others."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill import checkpoint, run
from distill.errors import InputError
from tests.conftest import Counted, Toy, environment
from tests.faults.damage import damage
from tests.faults.small_runs import SMALL, same_end, start
from tests.faults.warm import Warm

MANY = 20
"""Points passed so often in a row (each piece of a file) are tried at the first and in the middle."""


def points_of(cwd: Path) -> tuple[list[str], list[str]]:
    """The points of an undisturbed run before its first checkpoint stands, and from then on, as `NAME@N`."""
    passed: list[str] = json.loads((cwd / "passed.json").read_text())
    passed = passed[: passed.index("report.html opened")]
    seen: dict[str, int] = {}
    found: list[str] = []
    streak: list[str] = []
    for index, name in enumerate(passed):
        seen[name] = seen.get(name, 0) + 1
        streak.append(f"{name}@{seen[name]}")
        if passed[index + 1 : index + 2] != [name]:
            found += [streak[0], streak[len(streak) // 2]] if len(streak) > MANY else streak
            streak = []
    first = found.index("checkpoint renamed@1")
    return found[:first], found[first:]


SOME = ["last made@2", "step_00000004 renamed to be removed@1"]


@pytest.mark.parametrize("some", [SOME, pytest.param(None, marks=pytest.mark.soak)])
def test_a_kill_at_any_point_of_a_save_loses_nothing(
    warm: Warm, toy: Toy, undisturbed: Path, tmp_path: Path, counted: Counted, some: list[str] | None
) -> None:
    _, points = points_of(undisturbed)
    assert len(points) >= 100
    assert set(SOME) <= set(points)
    chosen = some or points
    left = resumed = 0
    for number, point in enumerate(chosen):
        cwd = tmp_path / str(number)
        assert start(warm, toy, cwd, fault=point).returncode == -signal.SIGKILL, point
        left += checkpoint.newest_intact(cwd / "run" / "checkpoints") is not None
        if not run.is_finished(cwd / "run"):
            result = start(warm, toy, cwd)
            assert result.returncode == 0, (point, result.stdout)
            same_end(cwd, undisturbed)
        resumed += 1
        shutil.rmtree(cwd)
    counted("a crash while saving leaves a verified checkpoint", done=left, of=len(chosen))
    counted("a run killed while saving ends like the undisturbed one", done=resumed, of=len(chosen))


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=pytest.mark.soak)])
def test_a_kill_before_the_first_checkpoint_starts_anew(
    warm: Warm, toy: Toy, undisturbed: Path, tmp_path: Path, counted: Counted, count: int | None
) -> None:
    early, _ = points_of(undisturbed)
    chosen = early if count is None else random.Random(0).sample(early, count)
    done = 0
    for number, point in enumerate(chosen):
        cwd = tmp_path / str(number)
        assert start(warm, toy, cwd, fault=point).returncode == -signal.SIGKILL, point
        assert checkpoint.newest_intact(cwd / "run" / "checkpoints") is None
        result = start(warm, toy, cwd)
        assert result.returncode == 0, (point, result.stdout)
        same_end(cwd, undisturbed)
        done += 1
        shutil.rmtree(cwd)
    counted("a run killed before its first checkpoint starts anew", done=done, of=len(chosen))


@pytest.mark.soak
@pytest.mark.parametrize("point", ["optimizer.pt begun@1500", "checkpoint verified@2", "export compared@1"])
def test_the_same_without_forks(warm: Warm, toy: Toy, undisturbed: Path, tmp_path: Path, point: str) -> None:
    command = [sys.executable, "-m", "distill.train", str(toy.recipe), *SMALL, "--out", "run", "--resume", "auto"]
    variables = environment(OMP_NUM_THREADS="1", DISTILL_FAULT=point)
    killed = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.newest_intact(tmp_path / "run" / "checkpoints") is not None
    assert start(warm, toy, tmp_path).returncode == 0
    same_end(tmp_path, undisturbed)


def test_a_torn_line_and_an_old_checkpoint_that_cannot_be_removed(warm: Warm, toy: Toy, tmp_path: Path) -> None:
    """The machine's crash can tear the line that a kill leaves whole."""
    last_only = "data.validation=0"  # nothing is the best, and one checkpoint stays
    start(warm, toy, tmp_path, last_only, fault="optimizer.pt begun@1500")
    out = tmp_path / "run"
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "train", "st')
    assert [line["step"] for line in run.read_metrics(out, "checkpoint")] == [2, 4]
    assert [path.name for path in checkpoint.existing(out / "checkpoints")] == ["step_00000002"]
    (old,) = checkpoint.existing(out / "checkpoints")
    old.chmod(0o555)
    result = start(warm, toy, tmp_path, last_only, modest=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("cannot be removed (Permission denied)") == 1
    assert [path.name for path in checkpoint.existing(out / "checkpoints")] == ["step_00000006"]
    assert [line["step"] for line in run.read_metrics(out, "checkpoint")] == [2, 4, 6]
    (leftover,) = (out / "checkpoints").glob(".*.tmp")
    leftover.chmod(0o755)


@pytest.mark.parametrize(("count", "resumed"), [(20, 1), pytest.param(200, 20, marks=pytest.mark.soak)])
def test_damage_to_a_checkpoint_is_found_before_anything_changes(
    warm: Warm, toy: Toy, tmp_path: Path, counted: Counted, count: int, resumed: int
) -> None:
    start(warm, toy, tmp_path, fault="export begun")
    out, chance = tmp_path / "run", random.Random(count)
    older, newest = checkpoint.existing(out / "checkpoints")
    intact = tmp_path / "intact"
    shutil.copytree(newest, intact)
    found = fallen_back = 0
    for trial in range(count):
        what = damage(newest / chance.choice(sorted(os.listdir(intact))), chance)
        with pytest.raises(InputError, match=what.split(":")[0].split()[0]):
            checkpoint.verify(newest)
        found += 1
        if trial < resumed:
            before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            # The named checkpoint is refused; else the one before it is taken, with one warning.
            refused = warm.run("train", toy.recipe, *SMALL, "--resume", newest, cwd=tmp_path)
            assert refused.returncode == 2, (what, refused.stdout)
            assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
            fell = start(warm, toy, tmp_path, fault="folder flushed@9")
            (warning,) = [line for line in fell.stdout.splitlines() if "Falling back" in line]
            assert newest.name in warning
            assert older.name in warning
            assert fell.returncode == -signal.SIGKILL
            fallen_back += 1
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(intact, newest)
    counted("damage to a checkpoint is found", done=found, of=count)
    counted("a resumption falls back behind a damaged checkpoint", done=fallen_back, of=resumed)


def test_a_damaged_best_checkpoint_is_not_exported(warm: Warm, toy: Toy, tmp_path: Path) -> None:
    start(warm, toy, tmp_path, fault="export begun")
    best = (tmp_path / "run" / "checkpoints" / "best").resolve()
    assert best.name == "step_00000002"
    (best / "ema.safetensors").write_bytes(b"")
    (best / "model.safetensors").write_bytes(b"")
    result = start(warm, toy, tmp_path)
    assert result.returncode == 0, result.stdout
    (warning,) = [line for line in result.stdout.splitlines() if "selection starts over" in line]
    assert "step_00000002/ema.safetensors: damaged" in warning
    assert run.read_status(tmp_path / "run")["exported"]["step"] == 6
