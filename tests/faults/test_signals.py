"""Promise 5: pre-emption is graceful. Real launches, real signals."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from contextvars import Context
from pathlib import Path

import pytest

from distill import checkpoint
from distill.errors import Interrupted
from distill.launching import signals
from distill.launching.exit_messages import EXIT_INTERRUPTED
from distill.launching.signals import StopRequest, deferred
from distill.run import read_metrics, read_status
from tests.conftest import Counted, Toy
from tests.faults.launched import COMMANDS, ROOT, Launched, paste

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DIRECT = [how for how in COMMANDS if "process" not in how]
LAUNCHERS = [how for how in COMMANDS if "process" in how]
LONG = ("train.epochs=1000", "train.log_every=1")


def interrupt(how: str, number: int, toy: Toy, folder: Path) -> tuple[float, float, list[str]]:
    """Seconds until there is a checkpoint, and from there until no process is left; and the exit message."""
    launched = Launched(how, toy.recipe, *LONG, cwd=folder, out=folder / "run")
    try:
        launched.until_step(3)
        os.kill(launched.process.pid, number)
        to_save = launched.until_state("interrupted", "failed")
        to_leave = launched.until_gone()
        status = read_status(launched.out)
        assert status["state"] == "interrupted", status
        newest = checkpoint.newest_intact(launched.out / "checkpoints")
        assert newest == checkpoint.folder_of_step(launched.out / "checkpoints", status["step"])
        assert status["step"] >= 3
        if how in DIRECT:
            assert launched.process.wait() == EXIT_INTERRUPTED
        words = launched.words()
        assert 3 <= len(words) <= 5, launched.console
        assert words[0].startswith("interrupted: "), "one process speaks"
        return to_save, to_leave, words
    finally:
        launched.end()


GRID = [(how, number) for how, number in itertools.product(COMMANDS, (*SIGNALS, signal.SIGKILL))
        if number != signal.SIGKILL or how in LAUNCHERS]  # fmt: skip


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("python distill/train.py", signal.SIGTERM)], id="1"),
        pytest.param(GRID, id=f"{len(GRID)}", marks=pytest.mark.soak),
    ],
)
def test_a_signal_ends_a_run_that_can_be_resumed_by_pasting(
    cases: list[tuple[str, int]], toy: Toy, tmp_path: Path, counted: Counted
) -> None:
    """SIGKILL is for the launcher alone: nobody passes anything on."""
    done, slowest_save, slowest_leave = 0, 0.0, 0.0
    for number, (how, sent) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        to_save, to_leave, words = interrupt(how, sent, toy, folder)
        if sent == signal.SIGKILL:
            assert to_save + to_leave < 15, how
        else:
            assert to_save < 10, how
            assert to_leave < 5, how
        slowest_save, slowest_leave = max(slowest_save, to_save), max(slowest_leave, to_leave)
        before = read_status(folder / "run")["step"]
        paste(words[-1], "train.max_minutes=0.0001", cwd=folder)
        status = read_status(folder / "run")
        # One step later, or none where what was left of the epoch was its evaluation.
        assert status["state"] == "interrupted", status
        assert status["step"] in (before, before + 1), status
        (resumed,) = read_metrics(folder / "run", "resume")
        assert resumed["step"] == before
        done += 1
    figures = {"slowest_checkpoint_s": round(slowest_save, 1), "slowest_end_s": round(slowest_leave, 1)}
    counted("pre-emption: a checkpoint, a truthful status, no process left", done=done, of=len(cases), **figures)


@pytest.mark.parametrize(
    "delays",
    [
        pytest.param((1.5,), id="1"),
        pytest.param([0.3 * step for step in range(1, 31)], id="30", marks=pytest.mark.soak),
    ],
)
def test_a_signal_at_any_time_is_an_interruption(
    delays: list[float], toy: Toy, tmp_path: Path, counted: Counted
) -> None:
    """From the imports on, through data, preflight, steps, evaluation, export, to the control's run."""
    done = 0
    for number, delay in enumerate(delays):
        out = tmp_path / str(number)
        launched = Launched("distill train", toy.recipe, "control=true", "--resume", "auto", cwd=tmp_path, out=out)
        try:
            time.sleep(delay)
            launched.process.send_signal(signal.SIGTERM)
            code = launched.process.wait(timeout=20)
            ended = "finished" if code == 0 else "interrupted"
            assert (code, read_status(out).get("state")) in ((0, "finished"), (EXIT_INTERRUPTED, ended)), (
                launched.console
            )
            assert "Traceback" not in launched.console
            assert [path.name for path in out.rglob("*.tmp")] == []
        finally:
            launched.end()
        done += 1
    counted("a signal at any time of a run", done=done, of=len(delays))


@pytest.mark.soak
def test_a_second_sigint_stops_at_once(toy: Toy, tmp_path: Path, counted: Counted) -> None:
    """Steps of many micro-batches: the first one would wait for the end of the step."""
    slow = ("train.batch_size=96", "train.gradient_accumulation=48", *LONG)
    launched = Launched("distill train", toy.recipe, *slow, cwd=tmp_path, out=tmp_path / "run")
    try:
        launched.until_step(1)
        launched.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        launched.process.send_signal(signal.SIGINT)
        assert launched.until_gone() < 5
        assert launched.process.wait() == EXIT_INTERRUPTED
        assert len(launched.console[launched.console.rindex("step ") :].splitlines()) <= 6
        assert read_status(launched.out)["state"] == "interrupted"
    finally:
        launched.end()
    counted("a second SIGINT stops at once", done=1, of=1)


def asked_in_training() -> None:
    with StopRequest() as stop, deferred():
        assert stop.reason() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGTERM"


def interrupted_elsewhere() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)


def interrupted_twice() -> None:
    with StopRequest() as stop, deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        assert stop.reason() == "SIGINT"
        time.sleep(2 * signals.DUPLICATE_WINDOW)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_a_process_that_goes_on_has_its_handlers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "DUPLICATE_WINDOW", 0.2)
    Context().run(stop_and_go_on)  # without the request of a command that an earlier test ran in this process


def stop_and_go_on() -> None:
    before, threads = [signal.getsignal(number) for number in SIGNALS], threading.active_count()
    for stopped, why in (
        (asked_in_training, "SIGTERM"),
        (asked_in_training, "SIGTERM"),
        (interrupted_elsewhere, "SIGUSR1"),
        (interrupted_twice, "a second SIGINT"),
    ):
        with pytest.raises(Interrupted, match=why):
            stopped()
        assert [signal.getsignal(number) for number in SIGNALS] == before
        assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="StopRequest"):
        StopRequest.current()


def test_on_another_thread_nothing_handles_signals() -> None:
    reasons = []

    def ask() -> None:
        with StopRequest() as stop:
            stop.limit(0)
            reasons.append(stop.reason())

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert reasons == [signals.TIME_LIMIT]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_end_of_a_child_is_no_reason_to_stop() -> None:
    """torch's DataLoader handles SIGCHLD, which comes whenever one of its workers ends."""
    code = (
        "import signal, subprocess, sys, time\n"
        "from distill.launching.signals import StopRequest\n"
        "stop = StopRequest(lambda error: 1)\n"
        "signal.signal(signal.SIGCHLD, lambda number, frame: print('a child ended'))\n"
        "subprocess.run(['true'])\n"
        "time.sleep(0.5)\n"
        "assert stop.reason() is None, stop.reason()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "a child ended\n"), result.stderr
