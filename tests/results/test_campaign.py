"""The campaign with runs that a small script makes up: order, skipping, resuming, failing, stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from results import campaign
from results.arms import ARMS, Arm, cells
from results.campaign import Campaign, Job, Slot, finished_identities

ROOT = Path(__file__).resolve().parents[2]

# Stands in for the real command: NAME DIR, as the environment says of it. It notes what it was given and when.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
name, path = sys.argv[1], Path(sys.argv[2])
path.mkdir(exist_ok=True)
def note(what):
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(json.dumps([name, what, sorted(os.sched_getaffinity(0)), time.monotonic()]) + "\\n")
def leave(number, frame):
    (path / "status.json").write_text('{"state": "interrupted"}')
    note("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
(path / "status.json").write_text('{"state": "running"}')
note("begun")
time.sleep(float(os.environ.get("SECONDS", "0.1")))
if name in os.environ.get("FAILING", "").split():
    sys.exit(3)
(path / "status.json").write_text('{"state": "finished", "metrics": {"student/top1": 12.5}}')
note("ended")
"""
Notes = Callable[[], list[list[object]]]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    """Has all jobs run the script instead; what its runs noted."""
    script, file = tmp_path / "fake.py", tmp_path / "notes.jsonl"
    script.write_text(FAKE)
    file.touch()
    monkeypatch.setenv("NOTES", str(file))
    monkeypatch.setattr(campaign, "LOOK", 0.02)
    faked = property(lambda job: [sys.executable, "-S", str(script), job.name, str(job.path)])
    monkeypatch.setattr(Job, "command", faked)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def jobs(runs: Path, *names: str, alone: str = "", minutes: float = 1.0) -> list[Job]:
    return [Job(Arm(name, "", "x.yaml", (), minutes, name == alone), 0, (), runs) for name in names]


def moments(notes: Notes, what: str) -> dict[str, float]:
    return {str(note[0]): float(str(note[3])) for note in notes() if note[1] == what}


def test_all_run_in_order_two_at_a_time_each_on_its_cores(tmp_path: Path, notes: Notes) -> None:
    cores = sorted(os.sched_getaffinity(0))
    slots = [Slot(frozenset(cores[:1])), Slot(frozenset(cores[-1:]))]
    assert Campaign(jobs(tmp_path / "runs", "a", "b", "c", "d", alone="d"), slots).run() == 0
    begun, ended = moments(notes, "begun"), moments(notes, "ended")
    assert set(ended) == {"a-0", "b-0", "c-0", "d-0"}
    assert max(begun["a-0"], begun["b-0"]) < begun["c-0"] < begun["d-0"]
    assert begun["c-0"] > min(ended["a-0"], ended["b-0"])
    assert begun["d-0"] > max(ended[name] for name in ("a-0", "b-0", "c-0"))  # it takes the whole machine
    used = {str(note[0]): note[2] for note in notes() if note[1] == "begun"}
    assert {tuple(used["a-0"]), tuple(used["b-0"])} == {(cores[0],), (cores[-1],)}  # type: ignore[arg-type]
    assert used["d-0"] == cores


def test_a_failed_run_does_not_stop_the_others_and_is_named(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "a-0")
    assert Campaign(jobs(tmp_path / "runs", "a", "b"), [Slot()]).run() == 1
    said = capsys.readouterr().out
    assert "a-0: failed with exit code 3" in said
    assert "b-0: finished in 0 min, 12.50 %" in said
    assert said.splitlines()[-1] == "failed: a-0"
    assert "1 of 2 finished" in said


def test_nothing_begins_that_would_end_too_late(
    tmp_path: Path, notes: Notes, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = jobs(tmp_path / "runs", "long", minutes=90.0), jobs(tmp_path / "runs", "short", minutes=1e-4)
    assert Campaign([*long, *short], [Slot()], hours=1.0).run() == 0
    assert [note[0] for note in notes() if note[1] == "begun"] == ["short-0"]
    assert "left for the next call: long-0" in capsys.readouterr().out


def test_the_time_that_is_left_goes_by_the_pace_so_far(tmp_path: Path) -> None:
    whole = Campaign(jobs(tmp_path, "a", "b", "c", minutes=10.0), [Slot(), Slot(gpu="1")])
    assert whole.minutes_left() == pytest.approx(15.0)
    whole._paces.append((20.0, 10.0))  # it took twice as long as expected
    assert whole.minutes_left() == pytest.approx(30.0)
    whole.waiting = jobs(tmp_path, "a", alone="a", minutes=10.0)
    assert whole.minutes_left() == pytest.approx(20.0)


def test_one_core_or_none_to_bind_is_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert campaign.cpu_slots() == [Slot()]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    assert campaign.cpu_slots() == [Slot(frozenset({0, 1})), Slot(frozenset({4, 5}))]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert campaign.cpu_slots() == [Slot()]


DRIVER = """
import sys
from pathlib import Path
from results import campaign
from results.arms import Arm
from results.campaign import Campaign, Job, Slot
runs, script, *names = sys.argv[1:]
Job.command = property(lambda job: [sys.executable, "-S", script, job.name, str(job.path)])
campaign.LOOK = 0.02
jobs = [Job(Arm(name, "", "x.yaml"), 0, (), Path(runs)) for name in names]
sys.exit(Campaign(jobs, [Slot(), Slot(gpu="1")]).run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_takes_its_runs_with_it_and_goes_on_later(
    tmp_path: Path, notes: Notes, number: signal.Signals
) -> None:
    def drive(seconds: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), str(tmp_path / "fake.py"), "a", "b", "c"]
        environment = os.environ | {"SECONDS": seconds}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    with drive("60") as process:
        _until(lambda: len(moments(notes, "begun")) == 2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    _until(lambda: set(moments(notes, "stopped")) == {"a-0", "b-0"})
    if number != signal.SIGKILL:
        assert process.returncode == campaign.STOPPED
        left = next(line for line in said.splitlines() if line.startswith("left for the next call"))
        assert {"a-0", "b-0", "c-0"} == set(left.partition(": ")[2].split(", "))
    with drive("0.1") as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "a-0: goes on" in said
    assert "c-0: begun" in said
    assert "3 of 3 finished" in said


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_finished_cell_is_found_by_what_it_learned_wherever_it_lies(tmp_path: Path) -> None:
    def write(path: Path, name: str, seed: int, state: str = "finished") -> None:
        path.mkdir(parents=True)
        (path / "status.json").write_text(json.dumps({"state": state}))
        (path / "resolved.yaml").write_text(ARMS[name].load(seed, ["data.root=elsewhere"]).to_yaml())

    write(tmp_path / "other-name", "nano-hard-guide", 0)
    write(tmp_path / "other-name" / "control", "nano-control", 0)  # trained beside it
    write(tmp_path / "nano-hard-1", "nano-hard", 1, state="running")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text('{"state": "finished"}')
    found = set(finished_identities([tmp_path]))
    left = [(arm.name, seed) for arm, seed in cells("cpu") if campaign.identity(arm.load(seed)) not in found]
    assert {(arm.name, seed) for arm, seed in cells("cpu")} - set(left) == {
        ("nano-hard-guide", 0), ("nano-control", 0),
    }  # fmt: skip


def test_the_list_has_the_real_commands_of_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "COLLECTED", tmp_path / "none")
    monkeypatch.setitem(campaign.CAMPAIGNS, "cpu", (("nano-hard", (4,)), ("nano-control", (4,))))
    assert campaign.main(["cpu", "data.root=d d", "--runs", str(tmp_path), "teacher.weights=w.th", "--list"]) == 0
    hard, control = capsys.readouterr().out.splitlines()
    assert hard.startswith("accelerate launch distill/train.py recipes/cifar10/nano_guide.yaml 'data.root=d d' ")
    assert hard.endswith(f" --out {tmp_path}/nano-hard-4 --resume auto")
    assert "teacher.weights=w.th teacher=null" in control  # an arm without a teacher stays one
    assert campaign.main(["cpu", "--runs", str(tmp_path), "data.rot=x"]) == 2
    assert "data.rot" in capsys.readouterr().err
