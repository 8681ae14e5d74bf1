"""Loader workers that never deliver: the run ends with one message, and listens to signals meanwhile."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils import data as torch_data

from distill import checkpoint
from distill.data import loading, stream
from distill.errors import RunFailed
from distill.launching import signals
from distill.run import read_metrics, read_status
from tests.conftest import Toy, image_folder, some
from tests.warm import Launched, launch

STEPS = 3
"""Of an epoch: 24 images in batches of 8."""


@pytest.fixture(scope="module")
def recipe(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams 24 images of three classes with two workers; a checkpoint at each of two epochs' ends."""
    folder = tmp_path_factory.mktemp("photographs")
    counts = {"train": 8, "validation": 4, "test": 4}
    image_folder(folder, ("ant", "bee", "cat"), counts, width=12, height=10)
    data = {"name": "folder", "root": str(folder), "stream": True, "workers": 2, "validation": 0.0}
    train = {"epochs": 2, "batch_size": 8, "gradient_accumulation": 1}
    mapping = toy.mapping(data=data, train=train) | {"distill": [], "teacher": None}
    (folder / "recipe.json").write_text(json.dumps(mapping))
    return folder / "recipe.json"


def block(epoch: int | None, rank: int = 0) -> None:
    """The workers of a process block: in the second step of an `epoch` of training, or in evaluation (None)."""
    decode = stream._Decoder.__getitem__

    def decode_or_block(decoder: Any, request: stream.Request) -> Any:
        draw, worker = request[1], torch_data.get_worker_info()
        there = os.environ.get("RANK", "0") == str(rank) and epoch == (None if draw is None else draw.epoch)
        if there and (draw is None or worker is None or worker.id == worker.num_workers - 1):
            time.sleep(3600)
        return decode(decoder, request)

    stream._Decoder.__getitem__ = decode_or_block  # type: ignore[method-assign]
    loading.POLL_INTERVAL, loading.IDLE_LIMIT, signals.WAIT_GRACE = 0.2, 2.0, 0.5


def block_for_long(epoch: int | None, rank: int = 0) -> None:
    """The same, with the usual limit."""
    limit = loading.IDLE_LIMIT
    block(epoch, rank)
    loading.IDLE_LIMIT = limit


def no_process_is_left(folder: Path) -> bool:
    """Whether none runs in a folder any more; idle workers notice after five seconds that their process has ended."""
    deadline = time.monotonic() + 20
    while living(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def living(folder: Path) -> list[int]:
    """The processes that run in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process.pid)
    return found


def until(launched: Launched, file: Path, text: str) -> None:
    deadline = time.monotonic() + 100
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline, launched.output
        time.sleep(0.02)


def test_a_worker_that_blocks_fails_the_run_which_goes_on_from_its_checkpoint(recipe: Path, tmp_path: Path) -> None:
    blocked = launch(["train", recipe, "--out", "run"], cwd=tmp_path, before=partial(block, 1))
    assert blocked.wait() == [3], blocked.output
    assert blocked.output.count("failed: data: no batch came for ") == 1
    assert "none of 2 workers reads or computes. /dev/shm has " in blocked.output
    assert "data.workers=0" in blocked.output
    assert "Traceback" not in blocked.output
    assert no_process_is_left(tmp_path)
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert f"step_{STEPS:08}" in blocked.output
    resumed = launch(["train", recipe, "--out", "run", "--resume", "auto"], cwd=tmp_path)
    assert resumed.wait() == [0], resumed.output
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train")] == list(range(1, 2 * STEPS + 1))


@pytest.mark.parametrize(("epoch", "step"), [(1, STEPS + 1), (None, STEPS)])
def test_a_signal_while_a_batch_is_waited_for(epoch: int | None, step: int, recipe: Path, tmp_path: Path) -> None:
    """Within the second epoch, and in the first evaluation."""
    command = ["train", recipe, "--out", "run", "data.validation=0.25"]  # its folder of validation images
    launched = launch(command, cwd=tmp_path, before=partial(block_for_long, epoch))
    until(launched, tmp_path / "run" / "metrics.jsonl", f'"train", "step": {step}')
    time.sleep(1)
    begun = time.monotonic()
    os.kill(launched.processes[0].pid or 0, signal.SIGTERM)
    assert launched.wait() == [75], launched.output
    assert time.monotonic() - begun < 10
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"], status["step"]) == ("interrupted", "SIGTERM", step)
    saved = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert saved == checkpoint.folder_of_step(tmp_path / "run" / "checkpoints", step)


def test_one_of_two_processes_waits_when_the_signal_comes(recipe: Path, tmp_path: Path) -> None:
    command = ["train", recipe, "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=2, before=partial(block_for_long, 1, 1))
    until(launched, tmp_path / "run" / "metrics.jsonl", f'"train", "step": {STEPS + 1}')
    time.sleep(1)
    for process in launched.processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    assert launched.wait() == [75, 75], launched.output
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"], status["step"]) == ("interrupted", "SIGTERM", STEPS)


def make_shared_memory_small(size: str) -> None:
    """A /dev/shm of its own for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0  # MS_REC | MS_PRIVATE
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()) == 0


@pytest.mark.parametrize("size", some(["64k", "16k", "128k"]))
def test_a_small_shared_memory_is_named(size: str, recipe: Path, tmp_path: Path) -> None:
    """There is no room for the loader's semaphores, or for a batch."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    # A batch of 8 images of 64 x 64 pixels has 98 kB.
    command = ["train", recipe, "data.resolution=64", "--out", "run", "train.max_steps=1"]
    failed = launch(command, cwd=tmp_path, before=partial(make_shared_memory_small, size))
    assert failed.wait() == [3], failed.output
    assert failed.output.count("failed: data: the workers cannot hand over their images: /dev/shm has ") == 1
    assert f"of {int(size[:-1]) * 1024:,} bytes free" in failed.output
    assert "data.workers=0" in failed.output
    assert "Traceback" not in failed.output
    without = launch([*command, "data.workers=0", "--resume", "auto"], cwd=tmp_path,
                     before=partial(make_shared_memory_small, size))  # fmt: skip
    assert without.wait() == [0], without.output


class Numbers(torch_data.Dataset):
    """0 to 3; each worker does something before its second."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= 2 and self.what == "compute":
            until = time.process_time() + 1.5
            while time.process_time() < until:
                pass
        if index >= 2 and self.what == "read":
            until = time.monotonic() + 1.5
            with open("/dev/zero", "rb", buffering=0) as file:
                while time.monotonic() < until:
                    file.read(1)
                    time.sleep(0.1)
        if index == 3 and self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([index])

    def __len__(self) -> int:
        return 4


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loading, "POLL_INTERVAL", 0.1)
    monkeypatch.setattr(loading, "IDLE_LIMIT", 1.0)
    monkeypatch.setattr(loading, "BUSY", 0.02)
    yield
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["nothing", "compute", "read"])
def test_workers_that_compute_or_read_are_waited_for(what: str) -> None:
    loader = loading.worker_loader(Numbers(what), workers=2)
    assert [item.tolist() for item in loading.items(loader)] == [[0], [1], [2], [3]]


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_was_killed_is_named() -> None:
    loader = loading.worker_loader(Numbers("die"), workers=1)
    with (
        closing(loading.items(loader)) as items,  # type: ignore[type-var]
        pytest.raises(RunFailed, match=r"data: a worker \(pid \d+\) died: SIGKILL\. /dev/shm has .*data\.workers=0"),
    ):
        list(items)
