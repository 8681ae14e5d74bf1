"""A process that has imported everything and forks real commands: each starts in milliseconds instead of seconds.

Run as a module it reads one JSON request a line and answers with the exit status and what was said.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import environment
from tests.warm import reload_here


class Warm:
    """Runs `distill` commands by forking; one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=Path(__file__).resolve().parents[2],
            # One thread: of several processes on the machine.
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: object, cwd: Path, **request: Any) -> subprocess.CompletedProcess[str]:
        """Run one command to its end, or to its death. The points of `distill.faults` that it passed are in
        `passed.json`, in order.

        Args:
            request: `fault`: the point at which it is killed; `file_size`: no file may grow beyond so many bytes;
                `modest`: root has to obey the modes of files like everybody else.
        """
        request |= {"arguments": [*map(str, arguments)], "cwd": str(cwd)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return subprocess.CompletedProcess([], *json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve() -> None:
    import torch

    import distill.cli
    import distill.dry_run
    import distill.pipeline
    import distill.report.comparison
    import distill.report.document
    import distill.report.tables  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            _become(request)
        os.close(writer)
        with open(reader) as console:
            output = console.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), output]), flush=True)


def _become(request: Mapping[str, Any]) -> None:
    """What a started command is: its own session, console, folder and environment."""
    from distill import faults
    from distill.cli import main
    from distill.exports import folder as export

    code = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        if "fault" in request:
            os.environ["DISTILL_FAULT"] = request["fault"]
        os.environ.update(request.get("environment", {}))
        if "file_size" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
        sys.argv = ["distill", *request["arguments"]]
        export.subprocess = SimpleNamespace(run=reload_here)  # type: ignore[assignment]
        if request.get("modest") and os.geteuid() == 0:
            _drop_capabilities()
        passed, point = [], faults.point
        faults.point = lambda name: (passed.append(name), point(name))  # type: ignore[assignment]
        code = main(request["arguments"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path("passed.json").write_text(json.dumps(passed))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _drop_capabilities() -> None:
    """Of overriding the modes of files (capset(2), version 3 of its structures)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    _serve()
