"""What a terminal shows while a run trains: stages, time left, the newest accuracy, and bars of what else it does."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

import distill.console as displayed
from tests.conftest import Toy, environment


def on_terminal(command: Sequence[str], cwd: Path, *, columns: int) -> list[str]:
    """What a terminal of that width is told, line by line, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    given = {key: value for key, value in environment(TERM="xterm-256color").items() if key != "COLUMNS"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=given, cwd=cwd)
    os.close(theirs)
    output = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 1)
        try:
            part = os.read(ours, 1 << 16) if ready else b""
        except OSError:  # the other end is closed
            break
        output += part
        if not part and process.poll() is not None:
            break
    assert process.wait() == 0, output.decode()
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode()))


def test_a_run_at_80_columns(toy: Toy, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "distill.train",
        str(toy.recipe),
        "control=true",
        "train.max_steps=12",
        "--out=run",
    ]
    lines = on_terminal(command, tmp_path, columns=80)
    bars = [line for line in lines if re.search(r"[━╸╺]", line) and not re.search("[┏┡]", line)]
    assert all(len(line) <= 80 for line in bars)
    student = [line for line in bars if line.startswith("1 of 2: student")]
    control = [line for line in bars if line.startswith("2 of 2: control")]
    assert student
    assert control
    assert re.search(r"12/12 \d+:\d\d left  loss \d\.\d{3}  top-1 \d+\.\d\d %  \d+/s", student[-1])
    assert re.search(r"12/12 0:00 left", control[-1]), "nothing is left after the last stage"
    assert {line.split()[0] for line in bars} >= {"preflight", "evaluation", "export"}
    told = [float(accuracy) for line in lines for accuracy in re.findall(r"validation top-1 ([\d.]+) %", line)]
    shown = [float(accuracy) for line in [*student, *control] for accuracy in re.findall(r"top-1 ([\d.]+) %", line)]
    assert set(shown) <= set(told)
    assert shown[-1] == told[-1], "the newest one"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A wide one."""
    console = Console(force_terminal=True, width=140, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(displayed, "console", console)
    return console


def test_parts_of_the_loss_where_there_is_room(terminal: Console) -> None:
    display = displayed.TrainingDisplay(
        "2 of 3: student", total_steps=40, steps_per_epoch=10, is_main=True, later_steps=40
    )
    with display:
        display.advance(0)
        display.advance(10)
        display.show(10, {"loss": 1.5, "loss/label": 2.0, "loss/guide": 1.0, "images_per_second": 1234.5})
        (task,) = display._progress.tasks
        assert re.fullmatch(r"\d:\d\d left  loss 1.500  label 2.000  guide 1.000  1234/s", task.fields["text"])
        display.accuracy("epoch 1.00 ...", "top-1 61.20 %")
        assert "top-1 61.20 %  1234/s" in task.fields["text"], "drawn when it is measured"
        assert list(displayed.track(iter("abc"), "evaluation", 3)) == ["a", "b", "c"]
        assert len(display._progress.tasks) == 1, "its bar is gone"


def test_a_bar_that_is_left_early_is_gone(terminal: Console) -> None:
    items = displayed.track(iter("abc"), "packing", 3)
    assert next(items) == "a"
    assert len(displayed._shown) == 1
    items.close()  # type: ignore[attr-defined]
    assert displayed._shown == []


def test_time_left_counts_later_stages(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(displayed.time, "monotonic", lambda: clock[0])
    display = displayed.TrainingDisplay("teacher", total_steps=30, steps_per_epoch=10, is_main=True, later_steps=3600)
    with display:
        display.advance(0)
        clock[0] += 20.0
        display.show(10, {"loss": 1.0, "images_per_second": 10.0})
        (task,) = display._progress.tasks
        assert task.fields["text"].startswith("2:00:40 left"), "20 steps and 3,600 later ones at two seconds each"


def test_stages_are_numbered_where_there_are_several() -> None:
    stages = displayed.Stages(["teacher", "student", "control"])
    assert stages.label("teacher") == "1 of 3: teacher"
    stages.done = 2
    assert stages.label("control") == "3 of 3: control"
    assert displayed.Stages(["student"]).label("student") == "student"


def test_elsewhere_than_on_a_terminal_there_are_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(displayed.track(range(3), "evaluation", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
