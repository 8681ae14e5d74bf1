"""Starts runs in processes of their own: here, side by side on the GPUs or cores, or as jobs of submitit."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distill import run
from distill.cores import cores
from distill.errors import InputError

PR_SET_PDEATHSIG = 1
DEVICES = "CUDA_VISIBLE_DEVICES"
DAY = 24 * 60
"""Minutes that a job may take, unless submitit is given a `timeout_min`."""


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None: it still runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


class Executor(Protocol):
    @property
    def parallel(self) -> int:
        """Jobs at a time."""

    @property
    def threads(self) -> int | None:
        """CPU threads of each; None: it finds out itself."""

    @property
    def workers(self) -> int | None:
        """Processes of each that decode streamed images, likewise."""

    def start(self, command: Sequence[str], path: Path, log: Path) -> Job:
        """Start the run at `path`, its output appended to `log`."""


class Process:
    """A process in a session of its own, which a Ctrl-C at the terminal does not reach. It gets SIGTERM, and so saves
    a checkpoint, when this process dies.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | (environment or {}),
                start_new_session=True,
                preexec_fn=_end_with(os.getpid()),
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """To the whole session: some launchers end without telling those that they launched."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _end_with(parent: int) -> Callable[[], None]:
    """What a child does first: have the kernel send it SIGTERM when its parent dies (prctl(2)); Linux alone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def prepare() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    return prepare


@dataclass
class Elsewhere:
    """A run that another process holds, such as one whose sweep was killed: wait until it has ended."""

    path: Path

    def poll(self) -> int | None:
        return None if run.holder_of(self.path) else 0

    def stop(self) -> None:
        """Nothing to do: whoever holds it ends it."""

    kill = stop


class Processes:
    """Runs as processes of this machine: one on each GPU, or with a share of the cores each."""

    def __init__(self, parallel: int | None, *, launched: bool = False) -> None:
        """`launched`: by a launcher of the user's, which has the GPUs to itself."""
        self._devices = [] if launched else visible_gpus()
        self.parallel = parallel or len(self._devices) or 1
        self.workers = None if self.parallel == 1 else max(1, cores() // self.parallel)
        self.threads = None if self._devices else self.workers
        self._running: list[tuple[Process, str | None]] = []

    def start(self, command: Sequence[str], path: Path, log: Path) -> Job:
        self._running = [(job, device) for job, device in self._running if job.poll() is None]
        taken = [device for _, device in self._running]
        device = min(self._devices, key=taken.count, default=None)
        job = Process(command, log, {} if device is None else {DEVICES: device})
        self._running.append((job, device))
        return job


def visible_gpus() -> list[str]:
    """Names of the GPUs that runs may use, as in CUDA_VISIBLE_DEVICES; asks no torch."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return []
    if (given := os.environ.get(DEVICES)) is not None:
        return [name for name in given.split(",") if name not in ("", "-1")]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return asked.stdout.split()
    return []


class Submitit:
    """Runs as jobs of submitit: on a Slurm cluster, or on this machine to try it."""

    threads = workers = None

    def __init__(self, cluster: str, parallel: int | None, folder: Path, options: dict[str, Any]) -> None:
        """
        Raises:
            InputError: submitit or Slurm is not there, or an option is not known.
        """
        try:
            import submitit
        except ImportError as error:
            raise InputError(
                f"executor: {cluster} needs submitit ({error}). Install it: "
                'python -m pip install "distill-vit[submitit]".'
            ) from None
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": DAY, **options})
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise InputError(
                f"executor: {cluster}: {' '.join(str(error).split())} Change `executor` or `options`."
            ) from None
        self._local = cluster == "local"
        self.parallel = parallel or 1

    def start(self, command: Sequence[str], path: Path, log: Path) -> Job:
        return SubmittedJob(self._executor.submit(run_command, list(command), path, log), self._local)


def run_command(command: Sequence[str], path: Path, log: Path) -> int:
    """Run a command within a job, unless its run has ended already; returns its exit code."""
    if run.state_of(path) == "trained" and "train.test=false" in command:
        return 0
    process = Process(command, log)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: process.stop())
    return process.wait()


class SubmittedJob:
    def __init__(self, job: Any, local: bool) -> None:
        self._job, self._local = job, local

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except Exception:  # the job itself died; its files say why
            return 1

    def stop(self) -> None:
        if self._local:  # its id is that of the process which passes signals on
            with suppress(ProcessLookupError):
                os.kill(int(self._job.job_id), signal.SIGTERM)
        else:
            self._job.cancel(check=False)

    kill = stop


def training_command(given: Sequence[str] | None) -> list[str]:
    """What starts a run, before its recipe and options."""
    return list(given) if given else [sys.executable, "-m", "distill.train"]
