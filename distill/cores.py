"""How many cores this process may use."""

import os


def cores() -> int:
    """Those that the system binds this process to; where it cannot tell, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int = 1) -> int:
    """Cores over the processes that the launcher started on this machine, or over `processes` where it does not say."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
