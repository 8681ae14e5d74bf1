"""What started this process: a person, or `accelerate launch` or torchrun; and the command that starts it again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process: each sets a variable that nobody else does."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def is_main_process() -> bool:
    """Whether this is process 0 of its launch; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def training_command(arguments: Sequence[str]) -> str:
    """A line for a shell that trains with these arguments as this process does.

    It is `distill train ARGUMENTS`, or `accelerate launch SCRIPT ARGUMENTS` if a launcher started this process. Named
    are a number of processes other than one, a precision other than the default, and the CPU if it was asked for; other
    options of a launcher (a configuration file, several machines) are the user's to repeat.
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
