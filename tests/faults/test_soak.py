"""Runs that are killed again and again end like the one that nobody touched, and leave nothing lying about."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import run
from tests.conftest import Counted, Toy, environment

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
TEACHER = f"teacher.recipe={ROOT / 'recipes' / 'teachers' / 'digits_cnn.yaml'}"
FIRST_KILL, LAST_KILL = 0.5, 14.0
"""Seconds after its start in which a process is killed: while it imports, prepares, trains, saves or exports. On a
loaded machine the last one comes later: in half the time of an undisturbed run.
"""


class Soak:
    """Runs of one command, one after the other, in folders of their own."""

    def __init__(self, folder: Path, recipe: Path, *overrides: str) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "distill.train", str(recipe), *overrides]
        self.kills = self.runs = 0
        self.last_kill = LAST_KILL
        self.dice = random.Random(0)
        folder.mkdir()

    def undisturbed(self) -> Path:
        place = self.folder / "undisturbed"
        place.mkdir()
        began = time.monotonic()
        assert self.start(place, "--out", "run").wait() == 0, (place / "console").read_text()
        self.last_kill = max(LAST_KILL, (time.monotonic() - began) / 2)
        return place

    def killed(self, kills: int) -> Path:
        """A run to its end, through at most so many kills; SIGTERM now and then, where it may stop by itself."""
        self.runs += 1
        place = self.folder / f"run{self.runs}"
        place.mkdir()
        while not run.is_finished(place / "run"):
            process = self.start(place, "--out", "run", "--resume", "auto")
            try:
                code = process.wait(self.dice.uniform(FIRST_KILL, self.last_kill) if kills else None)
                assert code == 0, (place / "console").read_text()
            except subprocess.TimeoutExpired:
                process.send_signal(self.dice.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
                assert process.wait() != 0 or run.is_finished(place / "run"), (place / "console").read_text()
                kills -= 1
                self.kills += 1
        return place

    def start(self, place: Path, *arguments: str) -> subprocess.Popen[bytes]:
        scratch = place / "scratch"
        scratch.mkdir(exist_ok=True)
        with (place / "console").open("ab") as console:
            return subprocess.Popen(
                [*self.command, *arguments], cwd=place, env=environment(TMPDIR=str(scratch)), stdout=console,
                stderr=subprocess.STDOUT,
            )  # fmt: skip


def same(one: Path, other: Path) -> bool:
    """Whether exports and predictions of the runs below (student's, control's, teacher's) are the same bytes."""
    files = sorted(
        file.relative_to(one)
        for pattern in ("export/model.safetensors", "predictions.safetensors")
        for file in one.rglob(pattern)
    )
    assert len(files) >= 2
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files if file.parts[0] == "run")


def leftovers(place: Path) -> list[Path]:
    hidden = [path for path in place.rglob(".*") if path.name != ".lock"]
    return hidden + list((place / "scratch").iterdir())


@pytest.mark.soak
def test_kills_change_nothing(toy: Toy, tmp_path: Path, counted: Counted) -> None:
    soak = Soak(tmp_path / "soak", toy.recipe)
    expected = soak.undisturbed()
    place = soak.killed(2)
    equal = same(expected, place) and not leftovers(place)
    counted("a run goes on after kills", done=int(equal), of=1, kills=soak.kills)


@pytest.mark.soak
def test_thirty_minutes_of_kills(tmp_path: Path, counted: Counted) -> None:
    soak = Soak(tmp_path / "soak", QUICKSTART, TEACHER)
    expected = soak.undisturbed()
    end = time.monotonic() + 30 * 60
    equal = 0
    while time.monotonic() < end or soak.kills < 100:
        place = soak.killed(1000)
        assert not leftovers(place), leftovers(place)
        equal += same(expected, place)
    growth = _growth(soak, expected)
    counted("quickstarts under kills end equal", done=equal, of=soak.runs, kills=soak.kills, **growth)


def _growth(soak: Soak, place: Path) -> dict[str, float]:
    """Of a process that trains for three minutes: memory in MiB and MiB a minute, open files at first and at last."""
    process = soak.start(place, "--out", "long", "train.epochs=100000", "train.max_minutes=3.5", "control=false")
    seconds, memory, files = [], [], []
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - began > 30 and next(run.read_metrics(place / "long", "train"), None):
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
            except OSError:
                break  # it has just ended
            if pages == 0:
                break
            seconds.append(time.monotonic() - began)
            memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            files.append(descriptors)
        time.sleep(0.5)
    process.wait()
    assert run.read_status(place / "long")["state"] == "interrupted"
    slope = 60 * statistics.linear_regression(seconds, memory).slope
    third = len(files) // 3
    assert max(files[-third:]) <= max(files[:third]), files
    assert slope < 0.005 * memory[0], "memory grows by half a percent a minute"
    return {
        "rss_mib": round(memory[-1], 1), "rss_mib_per_minute": round(slope, 3), "files_at_first": max(files[:third]),
        "files_at_last": max(files[-third:]),
    }  # fmt: skip
