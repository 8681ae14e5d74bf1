"""Whether a launcher (`accelerate launch`, torchrun) started this process, and the command to start it again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")
GROUP = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables of the processes that form a group."""


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process: each sets its own environment variable."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def is_main_process() -> bool:
    """Whether this is process 0 of its launch; needs no torch. One that is in no launch, whatever RANK says, is."""
    return os.environ.get("RANK", "0") == "0" or not _is_in_a_launch()


def is_local_main_process() -> bool:
    """Whether this is the first process of its launch on this machine; needs no torch."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or not _is_in_a_launch()


def _is_in_a_launch() -> bool:
    return is_launched() or os.environ.keys() >= GROUP


@cache
def launch_command() -> list[str]:
    """`accelerate launch` with its options and the script, as they were typed; empty where that is not known.

    Call it first while the launcher lives: they are in its own command line.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
    starts = [index for index, word in enumerate(words) if Path(word).name in LAUNCHERS]
    scripts = [index for index, word in enumerate(words) if word in (sys.argv[0], "distill.train", "distill.cli")]
    if not starts or not scripts:
        return []
    options = words[starts[0] + 1 : scripts[0] + 1]
    return ["accelerate", "launch", *(options[1:] if options[0] == "launch" else options)]


def training_command(arguments: Sequence[str]) -> str:
    """The shell command that trains with these arguments in the way this process was started.

    It is `distill train ARGUMENTS`, or `accelerate launch SCRIPT ARGUMENTS` if a launcher started this process, with
    the options that this launcher was given. Where they are not known (torchrun), it repeats the number of processes,
    the precision and the choice of a CPU if they are not the defaults.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    words = ["distill", "train"]
    if is_launched():
        subcommand = ["train"] if sys.argv[1:2] == ["train"] else []
        words = [*(launch_command() or _rebuilt(precision, on_cpu)), *subcommand]
        on_cpu = on_cpu and "--cpu" not in words
    return ("ACCELERATE_USE_CPU=true " if on_cpu else "") + shlex.join([*words, *arguments])


def _rebuilt(precision: str, on_cpu: bool) -> list[str]:
    """`accelerate launch SCRIPT`, with options by the environment of this process."""
    words, processes = ["accelerate", "launch"], os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        words += ["--multi_gpu", "--num_processes", processes]
    elif on_cpu:  # with one process, accelerate sets the variable by this option alone
        words.append("--cpu")
    if precision not in ("no", "fp32"):
        words += ["--mixed_precision", precision]
    return [*words, sys.argv[0]]
