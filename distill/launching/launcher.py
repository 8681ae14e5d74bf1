"""Whether a launcher (`accelerate launch`, torchrun) started this process, and the command to start it again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

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


def training_command(arguments: Sequence[str]) -> str:
    """The shell command that trains with these arguments in the way this process was started.

    It is `distill train ARGUMENTS`, or `accelerate launch SCRIPT ARGUMENTS` if a launcher started this process. It
    repeats the number of processes, the precision and the choice of a CPU where they are not the defaults, but no other
    launcher options (a configuration file, several machines).
    """
    processes, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    words = ["distill", "train"]
    if is_launched():
        words = ["accelerate", "launch"]
        if processes != "1":
            words += ["--multi_gpu", "--num_processes", processes]
        elif on_cpu:  # with one process, accelerate sets the variable by this option alone
            words.append("--cpu")
            on_cpu = False
        if precision not in ("no", "fp32"):
            words += ["--mixed_precision", precision]
        words += sys.argv[: 2 if sys.argv[1:2] == ["train"] else 1]
    return ("ACCELERATE_USE_CPU=true " if on_cpu else "") + shlex.join([*words, *arguments])
