"""Trials of a sweep as forks of it, which need not import torch again; for `before` of tests.warm.launch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from distill.sweeps import jobs


def trials_are_forks() -> None:
    jobs.Process = Forked  # type: ignore[assignment, misc]


class Forked:
    """As `distill.sweeps.jobs.Process`, for `python -m distill.train ARGUMENTS`."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        assert command[:3] == [sys.executable, "-m", "distill.train"]
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_train, args=(command[3:], log, environment or {}))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        if self.poll() is None:
            os.kill(self._process.pid or 0, signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()


def _train(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= environment
    sys.argv = ["distill", "train", *arguments]
    code = 1
    try:
        from distill.cli import main

        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
