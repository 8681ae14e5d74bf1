"""Suites, their peer and their processes at work, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import cli
from distill.bench import arms, suites
from distill.bench.machine import Machine
from distill.bench.measure import Row, Unmeasured
from distill.bench.peer import Peer, PilImages
from distill.bench.processes import Group
from distill.bench.suites import run_suite, step
from teachers.cifar_resnet import CifarResNet

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(CPU, ("vit_nano",), tmp_path, repetitions=2, matrix_rates={"fp32": 1e11, "bf16": 1e11})


@pytest.mark.parametrize("name", ["attention", "inference"])
def test_a_suite_yields_rows_with_ratios(name: str, machine: Machine) -> None:
    rows = list(run_suite(name, machine))
    assert rows
    for row in rows:
        assert isinstance(row, Row)
        assert row.ratio > 0
        assert row.spread[0] <= row.ratio <= row.spread[1]
        assert row.repetitions == 2
    assert len({(row.name, row.arm_a, row.arm_b) for row in rows if isinstance(row, Row)}) == len(rows)


def test_every_suite_of_the_command_is_a_file() -> None:
    files = {path.stem for path in Path(next(iter(suites.__path__))).glob("*.py")}
    assert files - {"__init__"} == set(cli.SUITES)


def test_the_command_prints_a_table_and_writes_json_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the command sets it; here it is taken back
    path = tmp_path / "figures.json"
    assert cli.main(["bench", "augment", "--device", "cpu", "--json", str(path)]) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(figures) == {"machine", "rows", "unmeasured", "computed"}
    assert figures["machine"]["threads"] >= 1
    assert figures["machine"]["matrix_gflops"]["fp32"] > 0
    assert {"torch", "timm"} <= set(figures["machine"]["versions"])
    keys = {"name", "arm_a", "arm_b", "ratio", "spread", "repetitions", "goal", "met"}
    assert all(keys <= set(row) and row["repetitions"] >= 5 for row in figures["rows"])
    printed, markdown = capsys.readouterr().out, path.with_suffix(".md").read_text(encoding="utf-8")
    for row in figures["rows"]:
        assert f"{row['ratio']:.3f}" in printed
        assert f"{row['ratio']:.3f}" in markdown


@pytest.mark.parametrize("arguments", [["nonsense"], ["--size", "giant"], ["augment", "--json", "nowhere/at/all.json"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as refusal:
        code = int(str(refusal.code))
    assert code == 2
    assert arguments[-1].split("/")[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_goals_for_other_machines_are_listed_with_the_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_area_over_plain", lambda *_: [])
    monkeypatch.setattr(step, "_growth", lambda *_: [])
    left_out = list(run_suite("step", machine))
    assert [one.goal for one in left_out if isinstance(one, Unmeasured)] == [
        ">= 1.5 at batch 1024",
        ">= 3 at batch 128",
    ]
    assert all("CUDA" in one.reason for one in left_out if isinstance(one, Unmeasured))


def test_the_peer_trains_the_same_student() -> None:
    student = arms.Student(batch_size=8)
    generator = np.random.default_rng(0)
    images = PilImages(generator.integers(256, size=(32, 32, 32, 3), dtype=np.uint8), np.zeros(32, dtype=np.int64))
    peer = Peer(student, CifarResNet(20), images, CPU, workers=1)
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    peer.start(1)
    peer.step()
    peer.stop()
    after = list(peer.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True) if new.ndim > 1)
    ours = arms.build_trainer(student.recipe(), arms.accelerator("fp32"))
    assert sum(parameter.numel() for parameter in after) == sum(
        parameter.numel() for parameter in ours.student.parameters()
    )


def test_processes_take_their_turns_together() -> None:
    with Group(processes=2, threads=1) as group:
        group.steps()
        group.steps()
        children = group._processes
    assert [child.returncode for child in children] == [0, 0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_of_memory_is_seen_though_it_is_gone_at_the_end() -> None:
    size = 64 << 20
    program = (
        "import torch; from distill.bench.suites.memory import peak\n"
        f"print(peak(lambda: torch.ones({size} // 4).sum(), torch.device('cpu')))"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert float(child.stdout) == pytest.approx(size, rel=0.1)
