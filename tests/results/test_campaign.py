"""The campaign with runs that a small script makes up: order, skipping, resuming, failing, stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from results import campaign
from results.arms import PLAN, Cells, cells, identity, load_arm
from results.campaign import Campaign, finished_identities

ROOT = Path(__file__).resolve().parents[2]

# Stands in for the real command: NAME DIR [key=value ...]. It notes what it was given and when.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
name, path = sys.argv[1], Path(sys.argv[2])
path.mkdir(exist_ok=True)
def note(what):
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(json.dumps([name, what, sys.argv[3:], time.monotonic()]) + "\\n")
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


@dataclass(frozen=True)
class Driven:
    """Campaigns of made-up runs."""

    runs: Path
    script: Path
    file: Path
    say: pytest.CaptureFixture[str]

    def run(self, *names: str, hours: float | None = None, minutes: float | None = None) -> tuple[int, list[str]]:
        """Exit code and lines of output."""
        code = Campaign(self.runs, [], hours, minutes).run([(name, 0) for name in names])
        return code, self.say.readouterr().out.splitlines()

    def notes(self, what: str) -> dict[str, float]:
        """When which run came to this, in the order in which they did."""
        notes = map(json.loads, self.file.read_text().splitlines())
        return {name: moment for name, noted, _, moment in notes if noted == what}


@pytest.fixture
def driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Driven]:
    found = Driven(tmp_path / "runs", tmp_path / "fake.py", tmp_path / "notes.jsonl", capsys)
    found.script.write_text(FAKE)
    found.file.touch()
    monkeypatch.setenv("NOTES", str(found.file))

    def command(self: Campaign, arm: str, seed: int) -> list[str]:
        return ["-S", str(found.script), f"{arm}-{seed}", str(self.path(arm, seed))]

    monkeypatch.setattr(Campaign, "command", command)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_all_run_one_after_the_other_in_their_order(driven: Driven) -> None:
    code, said = driven.run("b", "a", "c")
    assert code == 0
    begun, ended = driven.notes("begun"), driven.notes("ended")
    assert list(ended) == ["b-0", "a-0", "c-0"]
    assert ended["b-0"] < begun["a-0"]
    assert ended["a-0"] < begun["c-0"]
    assert [line.split(" ", 1)[1] for line in said[:2]] == ["b-0: begun", "b-0: finished, 12.50 %"]


def test_a_failed_run_does_not_stop_the_others_and_is_named(driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", "a-0")
    code, said = driven.run("a", "b")
    assert code == 1
    assert f" a-0: failed with exit code 3; see {driven.runs}/a-0.log" in said[1]
    assert said[-1] == "failed: a-0"
    assert set(driven.notes("ended")) == {"b-0"}


def test_hours_stop_a_run_in_time_and_begin_no_other(driven: Driven) -> None:
    assert driven.run("a", hours=1.0)[0] == 0
    (_, _, given, _) = json.loads(driven.file.read_text().splitlines()[0])
    assert [text.partition("=")[0] for text in given] == ["train.max_minutes"]
    assert 59 < float(given[0].partition("=")[2]) <= 60
    code, said = driven.run("b", "c", hours=0.0)
    assert code == 0
    assert said == ["left for the next call: b-0, c-0"]
    assert set(driven.notes("begun")) == {"a-0"}


@pytest.mark.parametrize(
    ("hours", "minutes", "least", "most"), [(None, 4.0, 4.0, 4.0), (1.0, 4.0, 4.0, 4.0), (0.05, 4.0, 2.0, 3.0)]
)
def test_minutes_limit_each_run_within_the_hours(
    driven: Driven, hours: float | None, minutes: float, least: float, most: float
) -> None:
    assert driven.run("a", "b", hours=hours, minutes=minutes)[0] == 0
    given = [json.loads(line)[2] for line in driven.file.read_text().splitlines()]
    limits = [float(text.removeprefix("train.max_minutes=")) for (text,) in given]
    assert len(limits) == 4  # as each of them began and ended
    assert all(least <= limit <= most for limit in limits)


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_campaign_runs_or_has_run_is_left_to_it(driven: Driven) -> None:
    for name, state in (("a-0", "running"), ("b-0", "finished")):
        (driven.runs / name).mkdir(parents=True)
        (driven.runs / name / "status.json").write_text(json.dumps({"state": state}))
    command = [sys.executable, "-c", HOLDER, str(driven.runs / "a-0" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said = driven.run("a", "b", "c")
        holder.communicate("")
    assert code == 0
    assert "a-0: run by another campaign" in said
    assert "b-0: run by another campaign" in said
    assert set(driven.notes("begun")) == {"c-0"}


# A campaign whose runs are that script.
DRIVER = """
import sys
from pathlib import Path
from results.campaign import Campaign
runs, script, *names = sys.argv[1:]
Campaign.command = lambda self, arm, seed: ["-S", script, f"{arm}-{seed}", str(self.path(arm, seed))]
sys.exit(Campaign(Path(runs), [], None).run([(name, 0) for name in names]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_stops_its_run_and_goes_on_later(driven: Driven, number: signal.Signals) -> None:
    command = [sys.executable, "-c", DRIVER, str(driven.runs), str(driven.script), "a", "b"]
    environment = os.environ | {"SECONDS": "60"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        _until(lambda: "a-0" in driven.notes("begun"))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == campaign.INTERRUPTED
    assert set(driven.notes("stopped")) == {"a-0"}
    assert output.splitlines()[-2].endswith(" a-0: interrupted, to go on with the next call")
    assert output.splitlines()[-1] == "left for the next call: b-0"
    code, said = driven.run("a", "b")
    assert code == 0
    assert said[0].endswith(" a-0: goes on")
    assert said[2].endswith(" b-0: begun")


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_finished_cell_is_found_by_what_it_learned_wherever_it_lies(tmp_path: Path) -> None:
    def write(path: Path, name: str, seed: int, state: str = "finished") -> None:
        path.mkdir(parents=True)
        (path / "status.json").write_text(json.dumps({"state": state}))
        (path / "resolved.yaml").write_text(load_arm(name, seed, ["data.root=elsewhere"]).to_yaml())

    write(tmp_path / "other-name", "nano-hard-guide", 0)
    write(tmp_path / "other-name" / "control", "nano-control", 0)  # trained beside it
    write(tmp_path / "nano-hard-1", "nano-hard", 1, state="running")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text('{"state": "finished"}')
    found = set(finished_identities([tmp_path]))
    done = {cell for cell in cells("cpu") if identity(load_arm(*cell)) in found}
    assert done == {("nano-hard-guide", 0), ("nano-control", 0)}


def test_the_list_has_the_real_commands_of_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "COLLECTED", tmp_path / "none")
    monkeypatch.setitem(PLAN.campaigns, "cpu", [Cells(arms=["nano-hard", "nano-control"], seeds=[4])])
    assert campaign.main(["cpu", "data.root=d d", "--runs", str(tmp_path), "teacher.weights=w.th", "--list"]) == 0
    hard, control = capsys.readouterr().out.splitlines()
    prefix, end = "accelerate launch distill/train.py results/recipes/nano-", "--resume auto"
    assert hard == f"{prefix}hard.yaml 'data.root=d d' teacher.weights=w.th seed=4 --out {tmp_path}/nano-hard-4 {end}"
    assert control == f"{prefix}control.yaml 'data.root=d d' seed=4 --out {tmp_path}/nano-control-4 {end}"
    assert campaign.main(["cpu", "--runs", str(tmp_path), "data.rot=x"]) == 2
    assert "data.rot" in capsys.readouterr().err
