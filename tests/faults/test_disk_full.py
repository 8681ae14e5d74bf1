"""Disks that are full or cannot be written: what stands there stays, the run goes on where it can, and says what it
needs.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import distill.exports.folder
from distill import checkpoint, run
from distill.errors import RunFailed
from distill.finishing import write_predictions
from distill.recipe import load
from tests.conftest import Counted, Toy
from tests.distributed.test_two_processes import launch
from tests.faults.small_runs import SMALL, same_end, start
from tests.faults.warm import Warm
from tests.test_resume import go

MEGABYTE = 1 << 20


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process and its children grows beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def failed(result: subprocess.CompletedProcess[str], out: Path, *, path: str, reason: str) -> None:
    """The run ended as failed, in at most five lines that name the path, the reason and the bytes needed."""
    assert result.returncode == 3, result.stdout
    assert "Traceback" not in result.stdout
    message = result.stdout[result.stdout.index("failed: ") :].splitlines()
    assert len(message) <= 5, message
    assert f"{path}: cannot be written: {reason}" in message[0]
    assert "bytes needed" in message[0]
    assert "--resume" in "".join(message)
    assert run.read_status(out)["state"] == "failed"
    assert "cannot be written" in run.read_status(out)["reason"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB: room for one checkpoint (10.9 MB) and no second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here, which takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(
    warm: Warm, toy: Toy, undisturbed: Path, small_disk: Path, tmp_path: Path, counted: Counted
) -> None:  # fmt: skip
    out, checkpoints = small_disk / "run", small_disk / "run" / "checkpoints"
    # The first checkpoint fits, the second and the last do not.
    result = start(warm, toy, tmp_path, out=out)
    failed(result, out, path="step_00000006", reason="No space left on device")
    assert result.stdout.count("step_00000004: cannot be written: No space left on device") == 1
    assert "Training continues" in result.stdout
    intact = checkpoint.newest_intact(checkpoints)
    assert intact is not None
    assert intact.name == "step_00000002"
    assert not [*checkpoints.glob(".*")], "it left its room to others"
    # With more room it goes on, and the disk fills before the export.
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert start(warm, toy, tmp_path, out=out, fault="export begun").returncode == -signal.SIGKILL
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - MEGABYTE))
    failed(start(warm, toy, tmp_path, out=out), out, path="disk/run/export", reason="No space left on device")
    assert not [*out.glob(".export*")]
    # No room for anything is found before training.
    with ballast.open("ab") as file:
        file.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    refused = start(warm, toy, tmp_path, out=out)
    assert refused.returncode == 2, refused.stdout
    assert "disk/run: cannot write the run directory: No space left on device" in refused.stdout
    ballast.unlink()
    assert start(warm, toy, tmp_path, out=out).returncode == 0
    same_end(small_disk, undisturbed)
    counted("a full disk costs no checkpoint and no run", done=1, of=1)


@pytest.mark.parametrize("limit", [3000, pytest.param(4 * MEGABYTE, marks=pytest.mark.soak)])
def test_a_limit_to_the_size_of_files(warm: Warm, toy: Toy, tmp_path: Path, counted: Counted, limit: int) -> None:
    """3,000 bytes are too few for the metrics too, 4 MB for the optimizer's state alone."""
    longer = ["train.epochs=5"]
    assert start(warm, toy, tmp_path, *longer, fault="best linked").returncode == -signal.SIGKILL
    result = start(warm, toy, tmp_path, *longer, file_size=limit)
    failed(result, tmp_path / "run", path="step_00000010", reason="File too large")
    assert result.stdout.count("Training continues") == 3
    assert result.stdout.count("metrics.jsonl: cannot be written") == (limit < MEGABYTE), "one warning for all lines"
    assert [path.name for path in checkpoint.existing(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
    steps = [line["step"] for line in run.read_metrics(tmp_path / "run", "eval")]
    assert steps == sorted(steps)
    assert start(warm, toy, tmp_path, *longer).returncode == 0
    counted("a limit to the size of files costs no checkpoint and no run", done=1, of=1)


def test_predictions_without_room(tmp_path: Path) -> None:
    place, values = run.Run(tmp_path, is_main=True), {"student.cls": torch.zeros(100, 4)}
    with limited(1000), pytest.raises(RunFailed, match=r"predictions.safetensors: cannot be written: .* \(2,400 bytes"):
        write_predictions(place, values, torch.zeros(100, dtype=torch.int64), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_the_best_weights_that_found_no_room_are_not_chosen(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(toy.recipe, list(SMALL))
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *_: None)

    class Relief:
        """Asked after each step; there is room again from the third on."""

        steps = 0

        def reason(self) -> None:
            self.steps += 1
            if self.steps == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)

    with limited(4 * MEGABYTE):
        go(recipe, tmp_path / "run", Relief())
    status = run.read_status(tmp_path / "run")
    assert status["state"] == "finished"
    tops = {line["step"]: line["student/top1"] for line in run.read_metrics(tmp_path / "run", "eval")}
    assert max(tops, key=lambda step: tops[step]) == 2, "else this shows nothing"
    assert status["exported"]["step"] in (4, 6)


@pytest.mark.soak
def test_two_processes_take_the_same_decision(toy: Toy, tmp_path: Path, counted: Counted) -> None:
    out = tmp_path / "run"
    with limited(4 * MEGABYTE):
        result = launch(2, toy.recipe, *SMALL, "--out", out, cwd=tmp_path)
    said = result.stdout + result.stderr
    assert said.count("Training continues") == 2, said
    assert said.count("failed: ") == 1, said
    assert run.read_status(out)["state"] == "failed"
    assert "File too large" in run.read_status(out)["reason"]
    assert launch(2, toy.recipe, *SMALL, "--out", out, "--resume", "auto", cwd=tmp_path).returncode == 0
    assert run.read_status(out)["state"] == "finished"
    counted("two processes on a full disk take the same decision", done=1, of=1)


def test_a_directory_that_cannot_be_written_is_refused_before_training(warm: Warm, toy: Toy, tmp_path: Path) -> None:
    assert start(warm, toy, tmp_path, fault="best linked").returncode == -signal.SIGKILL
    out = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    out.chmod(0o555)
    try:
        for arguments in (["--out", "run", "--resume", "auto"], ["--out", "run/new"]):
            refused = warm.run("train", toy.recipe, *SMALL, *arguments, cwd=tmp_path, modest=True)
            assert refused.returncode == 2, refused.stdout
            assert "cannot write the run directory: Permission denied" in refused.stdout
            assert " steps (" not in refused.stdout
    finally:
        out.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
