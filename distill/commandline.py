"""The command of a run, as a person types it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def recorded_command(words: Sequence[str], resumed: Path | None = None) -> str:
    """The shell command that began a run, from the arguments of its process in `environment.json`.

    Args:
        resumed: a run directory; then the command that goes on with the run there.
    """
    program, *_ = words
    left_out = ("--resume",) if resumed is None else ("--resume", "--out")
    kept = [
        word for before, word in pairwise(words) if before not in left_out and word.partition("=")[0] not in left_out
    ]
    goes_on = [] if resumed is None else ["--out", str(resumed), "--resume", "auto"]
    if program.endswith("train.py"):  # as a module, Python makes its path absolute
        script = ["-m", "distill.train"] if Path(program).is_absolute() else [program]
        return shlex.join(["accelerate", "launch", *script, *kept, *goes_on])
    if program.endswith(("distill", "cli.py")):
        return shlex.join(["distill", *kept, *goes_on])
    called = f"; from there: distill.train(..., out={str(resumed)!r}, resume='auto')"
    return shlex.join([program, *kept]) + ("" if resumed is None else called)
