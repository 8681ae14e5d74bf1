"""The `distill` command in real processes that need not import torch again: forked from one that has.

They load their exports themselves; tests/test_export.py has the fresh process that does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Before = Callable[[], None]
"""What a child does before the command, at the top of a module: forked processes find it by its name."""


@dataclass
class Launched:
    """The processes of one launch, and the file that their output goes to."""

    processes: list[ForkServerProcess]
    console: Path
    """Its standard output and standard error."""

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
    commands = ["distill.dry_run", "distill.evaluate_command", "distill.sweeps.command", "distill.sweeps.study"]
    context.set_forkserver_preload([*commands, "distill.report.document"])
    return context


def launch(
    arguments: Sequence[object],
    *,
    cwd: Path,
    processes: int = 1,
    before: Before | None = None,
    errors: Path | None = None,
    report: bool = False,
) -> Launched:
    """`distill ARGUMENTS` in so many processes of one group, on the CPU.

    Args:
        errors: a file for standard error alone.
        report: whether a run ends with its report, which takes longer than all else that a small one does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    console = cwd.with_name(f"{cwd.name}.console-{time.monotonic_ns()}")
    started = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = {name: str(value) for name, value in group.items()} if processes > 1 else {}
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        files = [str(console), str(errors or console)]
        started.append(
            _context().Process(
                target=_child, args=([*map(str, arguments)], str(cwd), files, environment, before, report)
            )
        )
        started[-1].start()
    return Launched(started, console)


def run(arguments: Sequence[object], *, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`distill ARGUMENTS` to its end, like `subprocess.run`."""
    errors = cwd.with_name(f"{cwd.name}.errors-{time.monotonic_ns()}")
    launched = launch(arguments, cwd=cwd, errors=errors, report=True)
    (code,) = launched.wait(timeout)
    return subprocess.CompletedProcess([*map(str, arguments)], code, launched.output, errors.read_text())


def reload_here(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """In place of the fresh process that loads an export: most of a run's seconds would be its imports."""
    from distill.exports.folder import reload

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        reload(*command[3:5])
    return subprocess.CompletedProcess(command, 0, output.getvalue(), "")


def _child(
    arguments: list[str],
    cwd: str,
    files: list[str],
    environment: dict[str, str],
    before: Before | None,
    report: bool,
) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ |= environment
    os.chdir(cwd)
    # Workers of data loaders are forked, as those of a command are.
    multiprocessing.set_start_method("fork", force=True)
    code = 1
    try:
        import distill.console
        from distill import pipeline
        from distill.cli import main
        from distill.exports import folder

        distill.console.console.file = sys.stdout
        folder.subprocess = SimpleNamespace(run=reload_here)  # type: ignore[assignment]
        if not report:
            pipeline.report_on = lambda _: None
        sys.argv = ["distill", *arguments]
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
