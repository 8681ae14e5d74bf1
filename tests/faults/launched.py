"""Real launches, watched from outside: which processes there are, and what becomes of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distill.run import read_metrics, read_status
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "distill" / "train.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
COMMANDS = {
    "distill train": [sys.executable, "-m", "distill.cli", "train"],
    "python distill/train.py": [sys.executable, SCRIPT],
    "python -m distill.train": [sys.executable, "-m", "distill.train"],
    "accelerate, 1 process": [*ACCELERATE, "--dynamo_backend", "no", "--cpu", "--num_processes", "1", SCRIPT],
    "accelerate, 2 processes": [
        *ACCELERATE, "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
        SCRIPT,
    ],
    "torchrun, 2 processes": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT,
    ],
}  # fmt: skip
"""How a person may start it. Two processes on a CPU: see DESIGN.md and accelerate's issue 2741."""


class Launched:
    """One launch, in a session of its own."""

    def __init__(self, how: str, *arguments: object, cwd: Path, out: Path) -> None:
        self.out, self._console = out, cwd / f"{out.name}.txt"
        with self._console.open("w") as console:
            self.process = subprocess.Popen(
                [*COMMANDS[how], *map(str, arguments), "--out", str(out)], cwd=cwd,
                env=environment(OMP_NUM_THREADS="1"),
                stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
                # Where the tests are a script's background job, SIGINT is ignored, and launchers would leave it so.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    @property
    def console(self) -> str:
        return self._console.read_text()

    def words(self) -> list[str]:
        """The lines that say how it ended, without what launchers add."""
        said = re.compile(r"(interrupted|failed|safe|details|continue|again): ")
        return [line for line in self.console.splitlines() if said.match(line)]

    def until(self, condition: Callable[[], bool], seconds: float = 100) -> float:
        """Wait; returns for how long."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() < begun + seconds, self.console
            time.sleep(0.02)
        return time.monotonic() - begun

    def until_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.console
            return any(line["step"] >= step for line in read_metrics(self.out, "train"))

        self.until(reached)

    def until_state(self, *states: str) -> float:
        return self.until(lambda: read_status(self.out).get("state") in states)

    def family(self) -> dict[int, dict[str, str]]:
        """The living processes of this launch, by their number, and the environment of each."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                texts = (path / "environ").read_text(errors="replace").split("\0")
            except OSError:
                continue
            if str(self.out).encode() in words:  # of a zombie there are none
                found[int(path.name)] = dict(text.split("=", 1) for text in texts if "=" in text)
        return found

    def pid_of(self, rank: int) -> int:
        (pid,) = [
            pid for pid, values in self.family().items() if values.get("RANK") == str(rank) and pid != self.process.pid
        ]
        return pid

    def until_gone(self, seconds: float = 60) -> float:
        """Until none of its processes is left; the launcher's child is reaped here."""

        def gone() -> bool:
            self.process.poll()
            return not self.family()

        return self.until(gone, seconds)

    def end(self) -> None:
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def paste(command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a person does with a line of the console, in a shell that knows nothing of the launch."""
    bare = {key: value for key, value in environment().items() if key != "ACCELERATE_USE_CPU"}
    bare["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{bare['PATH']}"
    line = " ".join([command.partition(": ")[2], *arguments])
    return subprocess.run(
        line, shell=True, cwd=cwd, env=bare, capture_output=True, text=True, timeout=200, check=False
    )  # fmt: skip
