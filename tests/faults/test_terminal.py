"""Ctrl-C at a terminal, under launchers that add a stack trace: what people see last is what the run says."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import signal
import subprocess
import termios
import threading
from pathlib import Path

import pytest

from distill.run import read_status
from tests.conftest import Toy, environment
from tests.faults.launched import COMMANDS, Launched


class AtTerminal(Launched):
    """A launch whose terminal is a pseudo-terminal; its signals come from the keyboard."""

    def __init__(self, how: str, *arguments: object, cwd: Path, out: Path) -> None:
        self.out, self.shown = out, b""
        self.keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMANDS[how], *map(str, arguments), "--out", str(out)], cwd=cwd,
            env=environment(OMP_NUM_THREADS="1", COLUMNS="100", TERM="xterm"),
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=self._prepare,
        )  # fmt: skip
        os.close(terminal)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @staticmethod
    def _prepare() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _read(self) -> None:
        try:
            while found := os.read(self.keyboard, 4096):
                self.shown += found
        except OSError:  # nobody holds the terminal any more
            pass

    @property
    def console(self) -> str:
        """Without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.shown.decode(errors="replace"))

    def type(self, key: bytes) -> None:
        os.write(self.keyboard, key)

    def end(self) -> None:
        super().end()
        self._reader.join(timeout=60)
        os.close(self.keyboard)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("distill train", marks=pytest.mark.soak),
        "accelerate, 1 process",
        pytest.param("accelerate, 2 processes", marks=pytest.mark.soak),
        pytest.param("torchrun, 2 processes", marks=pytest.mark.soak),
    ],
)
def test_a_ctrl_c_ends_in_the_lines_of_the_run(how: str, toy: Toy, tmp_path: Path) -> None:
    launched = AtTerminal(how, toy.recipe, "train.epochs=1000", "train.log_every=1", cwd=tmp_path, out=tmp_path / "run")
    try:
        launched.until_step(3)
        launched.type(b"\x03")
        launched.process.wait(timeout=60)
    finally:
        launched.end()
    assert read_status(launched.out)["state"] == "interrupted"
    last = [line for line in launched.console.splitlines() if line.strip()][-3:]
    starts = ("interrupted: SIGINT", "safe: all up to ", "continue: ")
    assert [line.startswith(start) for line, start in zip(last, starts, strict=True)] == [True] * 3, launched.console
    assert launched.console.count("interrupted: SIGINT") == 1
    if how.startswith("accelerate"):  # with the options that it was launched with
        options = shlex.join(COMMANDS[how][3:])
        assert f" accelerate launch {options} {toy.recipe} " in last[-1].replace("continue:", "")
