"""How many cores there are, how many are free, and what a process does with them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.cores import CoreContention, cores, share_of_cores, share_of_free_cores
from distill.launching import processes
from distill.launching.processes import set_threads


@pytest.fixture(autouse=True)
def eight_cores_and_no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tree(root: Path, **files: str) -> Path:
    """A file system with these files; `__` in their names stands for `/`, `_dot_` for `.`."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = {"proc__self__cgroup": "5:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc__self__cgroup": "0::/\n"}, 8),
        # Version 2: a container, half a core, none, a parent's limit, and a path that is the host's.
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_dot_max": "100000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_dot_max": "150000 100000\n"}, 2),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_dot_max": "max 100000\n"}, 8),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_dot_max": "9900000 100000\n"}, 8),
        (
            {
                "proc__self__cgroup": "0::/slice/job\n",
                "sys__fs__cgroup__slice__cpu_dot_max": "300000 100000\n",
                "sys__fs__cgroup__slice__job__cpu_dot_max": "max 100000\n",
            },
            3,
        ),
        ({"proc__self__cgroup": "0::/docker/abc\n", "sys__fs__cgroup__cpu_dot_max": "50000 100000\n"}, 1),
        # Version 1, under either name of the folder.
        (
            V1
            | {
                "sys__fs__cgroup__cpu,cpuacct__box__cpu_dot_cfs_quota_us": "200000\n",
                "sys__fs__cgroup__cpu,cpuacct__box__cpu_dot_cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            V1
            | {
                "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "100000\n",
                "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            V1
            | {
                "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert cores(tree(tmp_path, **files)) == expected


@pytest.mark.parametrize(("number", "expected"), [(1, 8), (2, 4), (5, 1), (16, 1)])
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, number: int, expected: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(number))
    assert share_of_cores() == expected


def stat(idle: list[int], passed: int) -> str:
    """/proc/stat after `passed` ticks of each core, of which it was idle `idle`."""
    lines = [f"cpu{core} {passed - ticks} 0 0 {ticks} 0 0 0 0 0 0" for core, ticks in enumerate(idle)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 12345", ""])


@pytest.mark.parametrize(
    ("idle", "number", "expected"),
    [
        ([100] * 8, 1, 8),
        ([100] * 7 + [0], 1, 7),
        ([100] * 7 + [60], 1, 8),
        ([55, 54] + [0] * 6, 1, 1),
        ([0] * 8, 1, 1),
        ([100] * 6 + [0, 0], 2, 3),
    ],
)
def test_cores_that_others_keep_busy_are_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: list[int], number: int, expected: int
) -> None:
    tree(tmp_path, proc__stat=stat([50] * 8, 200))
    later = stat([50 + ticks for ticks in idle], 300)
    monkeypatch.setattr(time, "sleep", lambda _: tree(tmp_path, proc__stat=later))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(number))
    assert share_of_free_cores(tmp_path) == expected


def test_where_the_kernel_does_not_tell_all_cores_are_free(tmp_path: Path) -> None:
    assert share_of_free_cores(tmp_path) == 8


def test_who_decides_on_the_threads(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The recipe, then the resumed run, then the user's environment, then what is free."""
    monkeypatch.setattr(processes, "share_of_free_cores", lambda: 3)
    assert set_threads() == torch.get_num_threads() == 3
    assert set_threads(earlier=6) == 6
    assert set_threads(asked=2, earlier=6) == torch.get_num_threads() == 2
    with caplog.at_level(logging.WARNING, logger="distill"):
        assert set_threads(earlier=12) == 3
    assert "began with 12 threads; here are 8 cores" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert set_threads() == 5
    assert set_threads(earlier=6) == 6
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # accelerate launch, which sets OMP_NUM_THREADS itself
    assert set_threads() == 3


def test_threads_that_wait_for_a_core_are_noticed() -> None:
    """Two processes that both compute on one core wait half of the time; a sleeping one does not."""
    program = (
        "import os, time\n"
        "from distill.cores import CoreContention\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "found = CoreContention()\n"
        "time.sleep(0.5)\n"
        "asleep, end = found.fraction(1), time.monotonic() + 3\n"
        "while time.monotonic() < end: pass\n"
        "print(asleep, found.fraction(1))\n"
    )
    root = Path(__file__).resolve().parents[1]
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:
        asleep, waiting = map(float, process.communicate(timeout=60)[0].split())
        assert asleep < 0.2
        assert waiting > 0.25
    assert CoreContention().fraction(1) < 1.5
