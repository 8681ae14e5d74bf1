"""Number of CPU cores that this process may use, how many are free, and whether its threads wait for them."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

ROOT = Path("/")
INTERVAL = 0.2
"""Seconds over which `share_of_free_cores` measures."""


def cores(root: Path = ROOT) -> int:
    """Cores in the affinity mask of this process, or all of the machine; cut to the CPU quota of its control groups,
    rounded up, as a container has one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(root))]))


def share_of_cores(processes: int = 1) -> int:
    """Cores per process of this machine; `processes` is used if the launcher does not set LOCAL_WORLD_SIZE."""
    return _share(cores(), processes)


def share_of_free_cores(root: Path = ROOT) -> int:
    """Like `share_of_cores`, without the cores that other processes keep busy: measured over `INTERVAL` seconds, in
    which the processes of this launch do nothing. At least 1.
    """
    before = _core_times(root)
    time.sleep(INTERVAL)
    after = _core_times(root)
    idle = sum((after[core][0] - ticks) / max(1, after[core][1] - total) for core, (ticks, total) in before.items())
    return _share(min(cores(root), round(idle)) if before else cores(root))


def _share(count: int, processes: int = 1) -> int:
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def _core_times(root: Path) -> dict[int, tuple[int, int]]:
    """Core in the affinity mask -> clock ticks of idleness and in all, since the machine started. Empty: not known."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return {}
    times = {}
    for name, *ticks in map(str.split, lines):
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in os.sched_getaffinity(0):
            # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); guests are in user already.
            counts = [*map(int, ticks[:8])]
            times[int(name[3:])] = counts[3] + counts[4], sum(counts)
    return times


def _quotas(root: Path) -> list[float]:
    """CPU quotas in cores of this process's control groups and those above them, versions 1 and 2 (cgroups(7))."""
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for entry in entries:
        _, controllers, group = entry.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("",):
            top = root / "sys/fs/cgroup" / mount
            own = top / group.lstrip("/")
            # In a container the path may be that on the host: then only the mounted folder itself exists.
            for folder in (own, *own.parents):
                quotas += _quota_of(folder)
                if folder == top:
                    break
    return quotas


def _quota_of(group: Path) -> list[float]:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


class CoreContention:
    """How long the threads of this process waited for a core while they could have run."""

    def __init__(self) -> None:
        self._began, self._waited = time.monotonic(), self._total()

    def fraction(self, threads: int) -> float:
        """Of the time of so many threads since the last call, 0 to 1; 0 where the kernel does not tell."""
        began, waited = self._began, self._waited
        self._began, self._waited = time.monotonic(), self._total()
        return max(0.0, self._waited - waited) / max(1e-9, (self._began - began) * threads)

    @staticmethod
    def _total() -> float:
        """Seconds on the run queue of all living threads (kernel: scheduler/sched-stats)."""
        total = 0
        for file in (ROOT / "proc/self/task").glob("*/schedstat"):
            try:
                total += int(file.read_text().split()[1])
            except (OSError, IndexError):
                continue  # the thread has just ended
        return total / 1e9
