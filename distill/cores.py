"""Number of CPU cores that this process may use."""

import os


def cores() -> int:
    """Cores in the affinity mask of this process, or all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int = 1) -> int:
    """Cores per process of this machine; `processes` is used if the launcher does not set LOCAL_WORLD_SIZE."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
