"""Two hosts, as network namespaces joined by a pair of virtual interfaces: training over both, and the loss of one."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import distill
from distill import checkpoint, faults
from distill.evaluation import Classification
from distill.launching import heartbeat, ranks, signals
from distill.launching.processes import on_main
from distill.run import read_metrics, read_status
from distill.trainer import Trainer
from tests.conftest import Counted, Toy, environment
from tests.warm import Launched, launch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("train.batch_size=48", "train.gradient_accumulation=1", "teacher=null", "distill=[]", "student.drop_path=0")
STEPS = 2
"""Of an epoch."""


class Host(NamedTuple):
    namespace: str
    interface: str
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts; whoever takes an interface down leaves no trace for the next test."""
    if not shutil.which("ip"):
        pytest.skip("no iproute2 for network namespaces")
    number = os.getpid()
    made = [Host(f"distill{number}-{rank}", f"dv{number}-{rank}"[-15:], f"10.77.0.{rank + 1}") for rank in (0, 1)]
    commands = [f"ip netns add {host.namespace}" for host in made]
    commands.append(
        f"ip link add {made[0].interface} netns {made[0].namespace} type veth "
        f"peer name {made[1].interface} netns {made[1].namespace}"
    )
    for host in made:
        commands.append(f"ip -n {host.namespace} address add {host.address}/24 dev {host.interface}")
        commands += [f"ip -n {host.namespace} link set {name} up" for name in (host.interface, "lo")]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {command}: {done.stderr.strip()}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


@pytest.fixture
def linked(hosts: list[Host]) -> list[Host]:
    for host in hosts:
        subprocess.run(["ip", "-n", host.namespace, "link", "set", host.interface, "up"], check=True)
    return hosts


def disconnect(host: Host) -> None:
    subprocess.run(["ip", "-n", host.namespace, "link", "set", host.interface, "down"], check=True)


@pytest.mark.soak
def test_the_launch_file_for_two_hosts(toy: Toy, linked: list[Host], tmp_path: Path, counted: Counted) -> None:
    """Losses equal those of one process; then the link goes down."""
    out, steps = tmp_path / "run", 30
    command = [toy.recipe, *SMALL, "train.epochs=2000", "train.batch_size=16"]
    alone = launch(["train", *command, "--out", "alone", f"train.max_steps={steps}"], cwd=tmp_path)
    launchers = []
    for rank, host in enumerate(linked):
        words = ["ip", "netns", "exec", host.namespace, sys.executable, "-m", "accelerate.commands.launch",
                 "--config_file", ROOT / "recipes" / "accelerate" / "two_nodes.yaml", "--num_processes", "2",
                 "--main_process_ip", linked[0].address, "--machine_rank", rank,
                 ROOT / "distill" / "train.py", *command, "--out", out]  # fmt: skip
        with (tmp_path / f"host-{rank}").open("w") as console:
            launchers.append(
                subprocess.Popen(
                    list(map(str, words)), cwd=tmp_path, stdout=console, stderr=subprocess.STDOUT,
                    env=environment(GLOO_SOCKET_IFNAME=host.interface, OMP_NUM_THREADS="1"), start_new_session=True,
                )
            )  # fmt: skip
    try:
        consoles = [tmp_path / f"host-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 150
        while not any(line["step"] >= steps for line in read_metrics(out, "train")):
            assert time.monotonic() < deadline, [console.read_text() for console in consoles]
            assert all(launcher.poll() is None for launcher in launchers), [file.read_text() for file in consoles]
            time.sleep(0.1)
        disconnect(linked[0])
        cut = time.monotonic()
        codes = [launcher.wait(timeout=100) for launcher in launchers]
        took = time.monotonic() - cut
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    said = [console.read_text() for console in consoles]
    assert all(codes), codes
    assert took < 60
    status = read_status(out)
    assert status["state"] == "failed"
    assert status["reason"].startswith("process 1 (pid ")
    assert f", {linked[1].address}) vanished: not heard from for 30 s" in status["reason"]
    assert said[0].count("failed: process 1 (") == 1, said[0]
    assert f", {linked[0].address}) vanished: the launch's key-value store" in said[1], said[1]
    assert alone.wait() == [0], alone.output
    one, two = ([line["loss"] for line in read_metrics(path, "train")][:steps] for path in (tmp_path / "alone", out))
    assert two == pytest.approx(one, abs=1e-5)
    saved = checkpoint.newest_intact(out / "checkpoints")
    assert saved is not None
    resumed = launch(["train", *command, "--out", out, "--resume", "auto", "train.max_minutes=0.0001"], cwd=tmp_path)
    assert resumed.wait() == [75], resumed.output
    resumes = read_status(out)["step"] == int(saved.name[5:]) + 1
    counted("one of two hosts vanished: the other stopped within 60 s", done=int(resumes), of=1, seconds=round(took, 1))


def hurry() -> None:
    """Limits that a test can wait for."""
    heartbeat.BEAT_INTERVAL, ranks.SILENCE_LIMIT, ranks.STORE_TIMEOUT, signals.STEP_GRACE = 0.2, 3.0, 1.0, 5.0


def enter(hosts: list[Host]) -> int:
    """Move this process to its host; returns its rank."""
    rank = int(os.environ["RANK"])
    with open(f"/run/netns/{hosts[rank].namespace}") as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) == 0  # CLONE_NEWNET
    os.environ |= {"MASTER_ADDR": hosts[0].address, "GLOO_SOCKET_IFNAME": hosts[rank].interface, "LOCAL_RANK": "0"}
    hurry()
    return rank


def cut_the_link_in(what: str, hosts: list[Host]) -> None:
    """In the second epoch, on the first host."""
    if enter(hosts) != 0:
        return
    point, evaluate, step = faults.point, Classification.__call__, Trainer.train_step
    counts = dict.fromkeys(("checkpoint verified", "evaluation"), 0)

    def count(name: str) -> None:
        counts[name] += 1
        if counts[name] == 2:
            disconnect(hosts[0])

    def passed(name: str) -> None:
        if what == "checkpoint" and name == "checkpoint verified":
            count(name)
        point(name)

    def evaluated(evaluator: Classification, *arguments: Any) -> dict[str, float]:
        if what == "evaluation":
            count(what)
        return evaluate(evaluator, *arguments)

    def trained(trainer: Trainer, *arguments: Any) -> None:
        if what == "step" and trainer.progress.step == STEPS + 1:
            disconnect(hosts[0])
        step(trainer, *arguments)

    faults.point, Classification.__call__ = passed, evaluated  # type: ignore[assignment, method-assign]
    Trainer.train_step = trained  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("what", "saved"),
    [
        ("step", STEPS),
        pytest.param("checkpoint", 2 * STEPS, marks=pytest.mark.soak),
        pytest.param("evaluation", STEPS, marks=pytest.mark.soak),
    ],
)
def test_a_host_that_vanishes(
    what: str, saved: int, toy: Toy, linked: list[Host], tmp_path: Path, counted: Counted
) -> None:
    command = ["train", toy.recipe, *SMALL, "train.ema=null", "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=2, before=partial(cut_the_link_in, what, linked))
    assert launched.wait() == [3, 3], launched.output
    assert launched.output.count("failed: process 1 (pid ") == 1, launched.output
    assert launched.output.count("failed: process 0 (pid ") == 1, launched.output
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed"
    assert f", {linked[1].address}) vanished: not heard from for 3 s" in status["reason"]
    newest = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert newest == checkpoint.folder_of_step(tmp_path / "run" / "checkpoints", saved)
    resumed = launch([*command, "--resume", "auto"], cwd=tmp_path)
    assert resumed.wait() == [0], resumed.output
    steps = [line["step"] for line in read_metrics(tmp_path / "run", "train")]
    counted("a host that vanished was named, and the run resumed", done=int(steps == [*range(1, 3 * STEPS + 1)]), of=1)


def train_in_python(recipe: Path, hosts: list[Host]) -> None:
    """`distill.train` raises what happened, and leaves no thread."""
    cut_the_link_in("step", hosts)
    try:
        distill.train(recipe, overrides=[*SMALL, "train.ema=null"], out="run")
    except distill.RunFailed as error:
        print(f"raised: {error}")
    deadline = time.monotonic() + 5
    while (left := {thread.name for thread in threading.enumerate()} & {"heartbeat", "stop"}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    print(f"left: {left}")
    raise SystemExit(7)


@pytest.mark.soak
def test_a_host_that_vanishes_from_python(toy: Toy, linked: list[Host], tmp_path: Path) -> None:
    launched = launch([], cwd=tmp_path, processes=2, before=partial(train_in_python, toy.recipe, linked))
    assert launched.wait() == [7, 7], launched.output
    assert launched.output.count("raised: process 1 (") == launched.output.count("raised: process 0 (") == 1
    assert launched.output.count("left: set()") == 2, launched.output


def until_step(launched: Launched, out: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while not any(line["step"] >= step for line in read_metrics(out, "train")):
        assert time.monotonic() < deadline, launched.output
        time.sleep(0.02)


@pytest.mark.soak
def test_a_process_that_is_stopped_is_named_and_all_of_them_go_on(toy: Toy, tmp_path: Path) -> None:
    command = ["train", toy.recipe, *SMALL, "train.epochs=1000", "train.batch_size=16", "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=2, before=hurry)
    until_step(launched, tmp_path / "run", 3)
    pids = [process.pid or 0 for process in launched.processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    before = max(line["step"] for line in read_metrics(tmp_path / "run", "train"))
    time.sleep(8)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    until_step(launched, tmp_path / "run", before + 10)
    os.kill(pids[1], signal.SIGSTOP)
    launched.processes[0].join(60)
    os.kill(pids[1], signal.SIGKILL)
    assert launched.wait() == [3, -signal.SIGKILL], launched.output
    assert f"failed: process 1 (pid {pids[1]} on " in launched.output
    assert read_status(tmp_path / "run")["state"] == "failed"


def train_twice_with_a_long_phase(recipe: Path) -> None:
    """Both processes are busy, or wait for one another, for longer than the limit."""
    hurry()
    build = Trainer.open_cache

    def compute(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sum(range(1000))

    def build_slowly(trainer: Trainer) -> None:
        on_main(lambda: compute(5))
        build(trainer)

    Trainer.open_cache = build_slowly  # type: ignore[method-assign]
    for out in ("first", "second"):
        distill.train(recipe, overrides=[*SMALL, "train.ema=null", "train.max_steps=1"], out=out)
        print(f"left: {[thread.name for thread in threading.enumerate() if thread.name in ('heartbeat', 'stop')]}")
    raise SystemExit(7)


@pytest.mark.soak
def test_long_phases_are_no_silence_and_no_thread_is_left(toy: Toy, tmp_path: Path) -> None:
    launched = launch([], cwd=tmp_path, processes=2, before=partial(train_twice_with_a_long_phase, toy.recipe))
    assert launched.wait() == [7, 7], launched.output
    assert launched.output.count("left: []") == 4, launched.output
