"""Runs a whole campaign unattended: every arm under every seed, by the real command, the most informative first.

    python -m results.campaign cpu|gpu --runs DIR [key=value ...] [--hours H] [--list]

In the project's folder. On a CPU two runs at a time, each on its half of the cores; on GPUs one on each. The overrides,
such as data.root=DIR, go to all runs. What is finished, in DIR or among the collected results, is skipped; what was
stopped or killed goes on at its newest checkpoint; a failed run does not stop the others. Ctrl-C and SIGTERM stop all,
resumable. The exit code is 0 if nothing failed, 1 if something did, 2 if it could not begin, 75 if it was stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill.errors import InputError
from distill.run import holder_of, is_finished, read_recipe, read_status
from results.arms import CAMPAIGNS, Arm, cells, identity

COLLECTED = Path(__file__).resolve().parent / "runs"
LOOK = 0.5
"""Seconds between two looks at what runs."""
PATIENCE = 120.0
"""Seconds that a run has for its checkpoint when the campaign is stopped."""
STOPPED = 75


@dataclass(frozen=True)
class Slot:
    """What one run has of the machine; None: as the campaign itself."""

    cores: frozenset[int] | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class Job:
    """One cell."""

    arm: Arm
    seed: int
    given: tuple[str, ...]
    runs: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def path(self) -> Path:
        return self.runs / self.name

    @property
    def command(self) -> list[str]:
        overrides = self.arm.all_overrides(self.seed, self.given)
        out = ["--out", str(self.path), "--resume", "auto"]
        return [sys.executable, "distill/train.py", self.arm.recipe, *overrides, *out]


@dataclass(frozen=True)
class Running:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    began: float
    fresh: bool
    """Not continued: its time is that of a whole run."""


class Campaign:
    """The loop. One a process, on its main thread: when that ends, however it ends, its runs are asked to stop."""

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], *, hours: float | None = None) -> None:
        self.waiting = list(jobs)
        self.slots = list(slots)
        self.running: list[Running] = []
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.stopping = False
        self._paces: list[tuple[float, float]] = []
        self._deadline = None if hours is None else time.monotonic() + 3600 * hours
        self._total = len(self.waiting)

    def run(self) -> int:
        """All of it; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        while not self.stopping and (self.running or self.waiting):
            while not self.stopping and self._start():
                pass
            if not self.running and all(self._too_late(job) for job in self.waiting):
                break
            time.sleep(LOOK)
            self._gather()
        if self.stopping:
            self._end_all()
        return self._sum_up()

    def minutes_left(self) -> float:
        """Expected, by the pace of the runs so far."""
        now = time.monotonic()
        # One that takes all cores keeps every slot waiting.
        waiting = sum(self._expected(job) * (len(self.slots) if job.arm.alone else 1) for job in self.waiting)
        begun = sum(max(0.0, self._expected(one.job) - (now - one.began) / 60) for one in self.running)
        return (waiting + begun) / len(self.slots)

    def _start(self) -> bool:
        """Begin one run, if there is room for one."""
        if any(one.job.arm.alone for one in self.running):
            return False
        free = [slot for slot in self.slots if all(slot != one.slot for one in self.running)]
        for job in self.waiting:
            if self._too_late(job):
                continue
            if (job.arm.alone and self.running) or not free:
                return False
            if holder_of(job.path):  # of a campaign that was killed: it is saving its checkpoint
                continue
            self.waiting.remove(job)
            self._launch(job, Slot() if job.arm.alone else free[0])
            return True
        return False

    def _launch(self, job: Job, slot: Slot) -> None:
        job.runs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({} if slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu})
        fresh = not (job.path / "status.json").exists()
        with (job.runs / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                preexec_fn=_prepare(slot.cores), start_new_session=True,
            )  # fmt: skip
        self.running.append(Running(job, slot, process, time.monotonic(), fresh))
        self._say(f"{job.name}: {'begun' if fresh else 'goes on'}")

    def _gather(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            minutes = (time.monotonic() - one.began) / 60
            if one.process.returncode == 0 and _finished(one.job.path):
                self.finished.append(one.job.name)
                if one.fresh:
                    self._paces.append((minutes, one.job.arm.minutes))
                self._say(f"{one.job.name}: finished in {minutes:.0f} min{_result(one.job.path)}")
            elif self.stopping:
                self.waiting.insert(0, one.job)
            else:
                self.failed.append(one.job.name)
                log = one.job.runs / f"{one.job.name}.log"
                self._say(f"{one.job.name}: failed with exit code {one.process.returncode}; see {log}")

    def _expected(self, job: Job) -> float:
        took, expected = (sum(column) for column in zip(*self._paces, strict=True)) if self._paces else (1.0, 1.0)
        return job.arm.minutes * took / expected

    def _too_late(self, job: Job) -> bool:
        return self._deadline is not None and time.monotonic() + 60 * self._expected(job) > self._deadline

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def _end_all(self) -> None:
        """Ask all runs to save and leave; kill what does not."""
        print("stopping", flush=True)
        for one in self.running:
            one.process.terminate()
        until = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < until:
            time.sleep(LOOK / 5)
            self._gather()
        for one in self.running:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()

    def _say(self, text: str) -> None:
        left = self.minutes_left()
        done = len(self.finished) + len(self.failed)
        expected = f"{int(left // 60)} h {int(left % 60):02d} min left"
        print(f"{time.strftime('%H:%M:%S')} {text} | {done} of {self._total}, about {expected}", flush=True)

    def _sum_up(self) -> int:
        print(f"{len(self.finished)} of {self._total} finished", flush=True)
        if self.failed:
            print(f"failed: {', '.join(self.failed)}", flush=True)
        if self.waiting or self.running:
            names = [job.name for job in (*(one.job for one in self.running), *self.waiting)]
            print(f"left for the next call: {', '.join(names)}", flush=True)
        return STOPPED if self.stopping else int(bool(self.failed))


def _prepare(cores: frozenset[int] | None) -> Callable[[], None]:
    """What a run does before it begins: it takes its cores, and will be asked to stop when the campaign is killed."""

    def prepare() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return prepare


def _finished(path: Path) -> bool:
    with suppress(InputError):
        return is_finished(path)
    return False


def _result(path: Path) -> str:
    top1 = read_status(path).get("metrics", {}).get("student/top1")
    return "" if top1 is None else f", {top1:.2f} %"


def finished_identities(folders: Sequence[Path]) -> Iterator[str]:
    """What was learned by the finished runs, controls among them, anywhere under the folders."""
    for status in (status for folder in folders for status in sorted(folder.rglob("status.json"))):
        with suppress(InputError):  # no run, or one of another version
            if is_finished(status.parent):
                yield identity(read_recipe(status.parent))


def cpu_slots() -> list[Slot]:
    """Two halves of the cores; one slot where there is one core, or the system cannot bind processes to cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return [Slot()]
    half = len(cores) // 2
    return [Slot(frozenset(cores[:half])), Slot(frozenset(cores[half : 2 * half]))]


def gpu_slots() -> list[Slot]:
    """One for each GPU."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [Slot(gpu=name) for name in names[:count]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=sorted(CAMPAIGNS))
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="where the run directories go")
    parser.add_argument("given", nargs="*", metavar="key=value", help="overrides for all runs")
    parser.add_argument("--hours", type=float, help="begin no run that is expected to end later")
    parser.add_argument("--list", action="store_true", help="print the commands of what is left, and run nothing")
    options = parser.parse_intermixed_args(arguments)
    if not Path("distill/train.py").is_file():
        print("error: run this in the project's folder", file=sys.stderr)
        return 2
    try:
        jobs = [Job(arm, seed, tuple(options.given), options.runs) for arm, seed in cells(options.campaign)]
        done = set(finished_identities([options.runs, COLLECTED]))
        left = [job for job in jobs if identity(job.arm.load(job.seed, job.given)) not in done]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for job in left:
            print(shlex.join(["accelerate", "launch", *job.command[1:]]))
        return 0
    slots = cpu_slots() if options.campaign == "cpu" else gpu_slots()
    if not slots:
        print("error: no GPU here", file=sys.stderr)
        return 2
    print(f"{len(jobs) - len(left)} of {len(jobs)} cells are there already; {len(slots)} at a time", flush=True)
    return Campaign(left, slots, hours=options.hours).run()


if __name__ == "__main__":
    sys.exit(main())
