"""Exit codes and exit messages of training commands: what happened, what is saved and how to continue."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.errors import InputError, Interrupted, RunFailed
from distill.launching.launcher import training_command

# 0: finished. 2: argparse's code for bad input. 75: EX_TEMPFAIL of sysexits.h, try again with --resume.
EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 75
EXIT_CTRL_C = 130
"""What shells say of a process that SIGINT has ended."""
LAUNCHER_GRACE = 40
"""Seconds to wait for the launcher's end; torchrun kills its processes after 30."""
AFTER_LAUNCHER = """
end=$(($(date +%s) + $2))
while kill -0 "$1" 2> /dev/null && [ "$(date +%s)" -lt "$end" ]; do sleep 0.05; done
printf '\\n%s\\n' "$3" >&2
"""
MAX_CHARACTERS = 500
"""Of an unexpected error; the log has all of it."""


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with `error`."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED


def exit_message(
    error: BaseException, directories: Sequence[Path], arguments: Sequence[str], resuming: Sequence[str]
) -> str:
    """The exit message, of at most five lines.

    Args:
        directories: of the runs that had begun: first the requested one, last the one that ended (perhaps that of a
            teacher or control within it).
        arguments: those of `distill train`.
        resuming: the same without --out and --resume.
    """
    begun = [directory for directory in directories if (directory / "status.json").exists()]
    if isinstance(error, InputError) and not begun:
        return f"error: {error}"
    if isinstance(error, Interrupted):
        lines = [f"interrupted: {error}"]
    elif isinstance(error, InputError | RunFailed):
        lines = [f"failed: {error}"]
    elif begun:
        lines = [f"failed: {describe(error)[:MAX_CHARACTERS]}", f"details: {begun[-1] / 'train.log'}"]
    else:
        return "".join(traceback.format_exception(error)).rstrip()
    if not begun:
        return "\n".join([*lines, "safe: nothing was started", f"again: {training_command(arguments)}"])
    if _is_finished(begun[0]):
        report = shlex.join(["distill", "compare", str(begun[0]), "--out", str(begun[0] / "report.html")])
        return "\n".join(
            [*lines, f"safe: the run is finished; only its report is missing: {begun[0]}", f"report: {report}"]
        )
    newest = newest_checkpoint(begun)
    safe = "no step is saved yet; the run starts over" if newest is None else f"all up to {newest}"
    command = training_command([*resuming, "--resume", str(begun[0])])
    return "\n".join([*lines, f"safe: {safe}", f"continue: {command}"])


def print_message(message: str, launcher: int | None) -> None:
    """Print the exit message to standard error. On a terminal it comes after the end of the launcher, which adds its
    own stack trace whenever a process ends early.

    Args:
        launcher: the process that started this one; None: it is none of a launch.
    """
    with suppress(OSError):  # a closed terminal or pipe
        if launcher is None or not sys.stderr.isatty() or not _is_launcher(launcher):
            print(message, file=sys.stderr, flush=True)
            return
        words = ["sh", "-c", AFTER_LAUNCHER, "sh", str(launcher), str(LAUNCHER_GRACE), message]
        # In a session of its own: neither the terminal's signals nor the launcher's reach it.
        subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)


def _is_launcher(process: int) -> bool:
    """Whether it runs, and is one: its environment, which says so, passes on to what a process of it starts."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed"))


def _is_finished(directory: Path) -> bool:
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # damaged since it was checked
        return False
    return isinstance(status, dict) and status.get("state") == "finished"


def write_interruption(error: Interrupted, directory: Path) -> None:
    """Create the run directory of a run that was interrupted before it began, so that `--resume` works; an existing
    directory is not changed.
    """
    with suppress(OSError):
        directory.mkdir(parents=True)
        status = {"state": "interrupted", "reason": str(error), "step": 0}
        (directory / "status.json").write_text(json.dumps(status, indent=1), encoding="utf-8")


def newest_checkpoint(directories: Sequence[Path]) -> Path | None:
    """The newest checkpoint of these runs and their controls."""
    found: list[tuple[int, Path]] = []
    for directory in directories:
        for path in (*directory.glob("checkpoints/step_*"), *directory.glob("control/checkpoints/step_*")):
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def describe(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
