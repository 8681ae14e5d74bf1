"""Promise 12: a process that dies makes the others stop within 60 seconds, and is named."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distill.launching import signals
from distill.launching.ranks import Ranks
from distill.run import read_status
from distill.trainer import Trainer
from tests.conftest import Counted, Toy
from tests.faults.launched import Launched, paste
from tests.warm import launch

ACCELERATE, TORCHRUN = "accelerate, 2 processes", "torchrun, 2 processes"


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([(ACCELERATE, 0)], id="1"),
        pytest.param(
            [(how, rank) for how in (ACCELERATE, TORCHRUN) for rank in (0, 1)] * 3,
            id="12", marks=pytest.mark.soak,
        ),
    ],
)  # fmt: skip
def test_the_others_stop_and_say_who_died(
    cases: list[tuple[str, int]], toy: Toy, tmp_path: Path, counted: Counted
) -> None:
    done, slowest = 0, 0.0
    for number, (how, rank) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        out = folder / "run"
        launched = Launched(how, toy.recipe, "train.epochs=1000", "train.log_every=1", cwd=folder, out=out)
        try:
            launched.until_step(7)
            pid = launched.pid_of(rank)
            os.kill(pid, signal.SIGKILL)
            slowest = max(slowest, launched.until_gone(60))
            status = read_status(out)
            assert status["state"] == "failed", status
            assert f"process {rank} died (pid {pid}" in status["reason"]
            words = launched.words()
            assert words[0].startswith(f"failed: process {rank} died"), launched.console
            assert "step_00000006" in words[1]
            assert 3 <= len(words) <= 5
        finally:
            launched.end()
        done += 1
    if len(cases) > 1:
        paste(words[-1], "train.max_minutes=0.0001", cwd=folder)
        status = read_status(out)
        assert (status["state"], status["step"]) == ("interrupted", 7)
    counted("a process that died was named, the others stopped", done=done, of=len(cases), slowest_s=round(slowest, 1))


def one_after_the_other() -> None:
    """Process 0 dies in the first step, and process 2 ends only after process 1 has said so and ended."""
    rank, write, signals.STEP_GRACE = int(os.environ["RANK"]), Ranks.write_exit_message, 2.0

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wait_and_write(ranks: Ranks, error: BaseException) -> None:
        until = time.monotonic() + 60
        while len(ranks.ended()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        print("the others are gone")
        write(ranks, error)

    if rank == 0:
        Trainer.train_step = die  # type: ignore[method-assign]
    if rank == 2:
        Ranks.write_exit_message = wait_and_write  # type: ignore[method-assign]


def test_of_two_that_live_one_speaks(toy: Toy, tmp_path: Path) -> None:
    command = ["train", toy.recipe, "train.batch_size=12", "train.gradient_accumulation=1", "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=3, before=one_after_the_other)
    assert launched.wait() == [-signal.SIGKILL, 3, 3], launched.output
    assert "the others are gone" in launched.output
    assert launched.output.count("failed: process 0 died") == launched.output.count("failed: ") == 1, launched.output
    assert read_status(tmp_path / "run")["state"] == "failed"
