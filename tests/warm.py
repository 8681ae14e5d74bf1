"""The `distill` command in real processes that need not import torch again: forked from one that has."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

Before = Callable[[], None]
"""What a child does before the command, at the top of a module: forked processes find it by its name."""


@dataclass
class Launched:
    """The processes of one launch, and the file that their output goes to."""

    processes: list[ForkServerProcess]
    console: Path

    def wait(self, timeout: float = 120) -> list[int]:
        """Their exit codes; after the timeout they are killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [process for process in self.processes if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        assert not stuck, f"{len(stuck)} processes did not end:\n{self.output}"
        return [process.exitcode or 0 for process in self.processes]

    @property
    def output(self) -> str:
        return self.console.read_text()


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.pipeline", "distill.dry_run", "distill.commands", "matplotlib.pyplot"])
    return context


def launch(arguments: Sequence[object], *, cwd: Path, processes: int = 1, before: Before | None = None) -> Launched:
    """`distill ARGUMENTS` in so many processes of one group, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    console = cwd / f"console-{time.monotonic_ns()}"
    started = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = {name: str(value) for name, value in group.items()} if processes > 1 else {}
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        started.append(
            _context().Process(
                target=_child, args=([*map(str, arguments)], str(cwd), str(console), environment, before)
            )
        )
        started[-1].start()
    return Launched(started, console)


def _child(arguments: list[str], cwd: str, console: str, environment: dict[str, str], before: Before | None) -> None:
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "OMP_"))]:
        del os.environ[name]
    os.environ |= environment
    os.chdir(cwd)
    code = 1
    try:
        import distill.console
        from distill.cli import main

        distill.console.console.file = sys.stdout
        if before is not None:
            before()
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
