"""Named points at which tests kill the process.

`DISTILL_FAULT=NAME` in the environment kills it at the first pass of that point, `NAME@N` at the N-th.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

passed: Counter[str] = Counter()
"""How often each point was passed."""


def point(name: str) -> None:
    """Kill the process here if DISTILL_FAULT says so."""
    passed[name] += 1
    if os.environ.get("DISTILL_FAULT") in (name, f"{name}@{passed[name]}"):
        os.kill(os.getpid(), signal.SIGKILL)
