"""Runs a whole campaign of plan.yaml unattended: each arm under each seed, by the real command, one after the other.

    python -m results.campaign cpu|gpu|... --runs DIR [key=value ...] [--hours H] [--minutes M] [--list]

In the project's folder. The overrides, such as data.root=DIR, go to all runs, so the arms of a campaign have their
data in one folder: that of cifar10.safetensors, of `clothing` the one with train, val and test (plan.yaml). What is
finished, in DIR or among the collected results, is skipped; what was stopped or killed goes on at its newest
checkpoint; a failed run does not stop the others. To use half of the cores, or one of several GPUs, for a run, start
a campaign on each (`taskset -c 0`, CUDA_VISIBLE_DEVICES=0): each leaves to the others what they run. Ctrl-C and
SIGTERM stop it, resumable.
`gpu-short` is for a machine that is there for minutes: a run of it takes less than four of one large GPU, and
`--minutes 4` stops one that would take longer. `gpu` has runs of 300 and 900 epochs.
The exit code is 0 if nothing failed, 1 if something did, 2 if it could not begin, 75 if it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from distill.errors import InputError
from distill.run import holder_of, is_finished, read_recipe, read_status
from distill.sweeps.jobs import Process
from results.arms import ARMS, HERE, PLAN, cells, identity, load_arm, overrides

COLLECTED = HERE / "runs"
INTERRUPTED = 75
ELSEWHERE = "run by another campaign"


class Campaign:
    """One a process, on its main thread."""

    def __init__(self, runs: Path, given: Sequence[str], hours: float | None, minutes: float | None = None) -> None:
        self.runs = runs
        self.given = given
        self.failed: list[str] = []
        self.stopping = False
        self._minutes = float("inf") if minutes is None else minutes
        self._deadline = float("inf") if hours is None else time.monotonic() + 3600 * hours
        self._process: Process | None = None

    def path(self, arm: str, seed: int) -> Path:
        return self.runs / f"{arm}-{seed}"

    def command(self, arm: str, seed: int) -> list[str]:
        recipe = os.path.relpath(ARMS[arm])
        out = ["--out", str(self.path(arm, seed)), "--resume", "auto"]
        return ["distill/train.py", recipe, *overrides(arm, seed, self.given), *out]

    def run(self, left: Sequence[tuple[str, int]]) -> int:
        """All cells that are left; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        self.runs.mkdir(parents=True, exist_ok=True)
        for number, cell in enumerate(left):
            minutes = (self._deadline - time.monotonic()) / 60
            if self.stopping or minutes <= 0:
                print(f"left for the next call: {', '.join(self.path(*later).name for later in left[number:])}")
                break
            if is_finished(self.path(*cell)) or holder_of(self.path(*cell)):
                print(f"{self.path(*cell).name}: {ELSEWHERE}", flush=True)
                continue
            minutes = min(minutes, self._minutes)
            limit = [] if minutes == float("inf") else [f"train.max_minutes={minutes:.2f}"]
            self._launch(self.path(*cell), [*self.command(*cell), *limit])
        if self.failed:
            print(f"failed: {', '.join(self.failed)}", flush=True)
        return INTERRUPTED if self.stopping else int(bool(self.failed))

    def _launch(self, path: Path, command: Sequence[str]) -> None:
        log = self.runs / f"{path.name}.log"
        print(f"{time.strftime('%H:%M:%S')} {path.name}: {'goes on' if path.exists() else 'begun'}", flush=True)
        self._process = Process([sys.executable, *command], log)
        code = self._process.wait()
        if code == 0:
            result = read_status(path).get("metrics", {}).get("student/top1")
            said = "finished" + ("" if result is None else f", {result:.2f} %")
        elif code == INTERRUPTED:
            said = "interrupted, to go on with the next call"
        elif holder_of(path):
            said = ELSEWHERE  # begun there at the same time
        else:
            self.failed.append(path.name)
            said = f"failed with exit code {code}; see {log}"
        print(f"{time.strftime('%H:%M:%S')} {path.name}: {said}", flush=True)

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True
        if self._process is not None:
            self._process.stop()


def finished_identities(folders: Sequence[Path]) -> Iterator[str]:
    """What was learned by the finished runs, controls among them, anywhere under the folders."""
    for status in (status for folder in folders for status in sorted(folder.rglob("status.json"))):
        with suppress(InputError):  # no run, or one of another version
            if is_finished(status.parent):
                yield identity(read_recipe(status.parent))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=sorted(PLAN.campaigns))
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="where the run directories go")
    parser.add_argument("given", nargs="*", metavar="key=value", help="overrides for all runs")
    parser.add_argument("--hours", type=float, help="stop, resumable, after so long")
    parser.add_argument("--minutes", type=float, help="stop each run, resumable, after so long")
    parser.add_argument("--list", action="store_true", help="print the commands of what is left, and run nothing")
    options = parser.parse_intermixed_args(arguments)
    if not Path("distill/train.py").is_file():
        print("error: run this in the project's folder", file=sys.stderr)
        return 2
    campaign, asked = Campaign(options.runs, options.given, options.hours, options.minutes), cells(options.campaign)
    try:
        done = set(finished_identities([options.runs, COLLECTED]))
        left = [cell for cell in asked if identity(load_arm(*cell, options.given)) not in done]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for cell in left:
            print(shlex.join(["accelerate", "launch", *campaign.command(*cell)]))
        return 0
    print(f"{len(asked) - len(left)} of {len(asked)} cells are there already", flush=True)
    return campaign.run(left)


if __name__ == "__main__":
    sys.exit(main())
