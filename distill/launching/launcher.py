"""The command that started this process: alone, or by `accelerate launch` or torchrun; who lives, and how to go on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = frozenset({
    "accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torch.distributed.run", "torch.distributed.launch",
})  # fmt: skip
SETTINGS = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES")
"""Variables that may stand before a command, and without which it would be another one."""


@dataclass(frozen=True)
class Process:
    """One process of this machine; the moment it started tells it from a later one with the same number."""

    pid: int
    started: str

    @property
    def lives(self) -> bool:
        return find_process(self.pid) == self


def find_process(pid: int) -> Process | None:
    """The living process of that number; None where it is dead, or no /proc says so."""
    try:
        # The name, in parentheses, may hold anything; what follows it are numbers, but for the state.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZXx" else Process(pid, fields[19])


@dataclass(frozen=True)
class Command:
    """How this process was started; to be asked for early, while the launcher still lives."""

    words: tuple[str, ...]
    """Up to our own arguments."""
    settings: tuple[str, ...]
    launcher: Process | None
    """None where nobody whose end should be ours started it: a shell that exits is none."""

    @classmethod
    def find(cls, arguments: Sequence[str]) -> Command:
        """Of this process, whose own arguments are `arguments`."""
        given = list(arguments)
        parent = os.getppid()
        process, words = find_process(parent), _strings(parent, "cmdline")
        split = len(words) - len(given)
        if (
            process is not None
            and words[split:] == given
            and any(Path(word).name in LAUNCHERS for word in words[:split])
        ):
            return cls(_as_typed(words[:split]), _settings(_strings(parent, "environ")), process)
        words = sys.orig_argv[: len(sys.orig_argv) - len(given)]
        return cls(_as_typed(words), _settings([f"{key}={value}" for key, value in os.environ.items()]), None)

    def resuming(self, arguments: Sequence[str], directory: Path | None) -> str:
        """The same command with these arguments, continuing the run in `directory` (None: without --resume)."""
        resume = [] if directory is None else ["--resume", str(directory)]
        settings = [f"{key}={shlex.quote(value)}" for key, _, value in (text.partition("=") for text in self.settings)]
        return " ".join([*settings, shlex.join([*self.words, *arguments, *resume])])


def _as_typed(words: Sequence[str]) -> tuple[str, ...]:
    """Without the interpreter that an installed command starts itself, and without the folder it is found in."""
    if len(words) < 2 or Path(words[1]).name not in {*LAUNCHERS, "distill"} or not os.access(words[1], os.X_OK):
        return tuple(words)
    name = Path(words[1]).name
    return (name if shutil.which(name) == words[1] else words[1], *words[2:])


def _strings(pid: int, name: str) -> list[str]:
    """The command line, or the environment, of a process; empty where the system does not tell."""
    try:
        return [os.fsdecode(part) for part in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def _settings(environment: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(text for text in environment if text.startswith(SETTINGS)))
