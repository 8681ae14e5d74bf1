"""Suites, their peer and their processes at work, small."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import cli
from distill.bench import arms, suites
from distill.bench.measure import Arm, Machine, Row, compare
from distill.bench.peer import Peer, PilImages
from distill.bench.suites import shared
from distill.bench.suites.attention import summed_area_attention
from distill.bench.suites.pipeline import seconds_an_image
from distill.students.attention.area import area_attention
from teachers.cifar_resnet import CifarResNet
from tests.conftest import some

CPU = torch.device("cpu")
RECORDED = Path(__file__).resolve().parents[2] / "results" / "bench" / "cpu-fp32.json"


def kind(row: Row) -> tuple[str, ...]:
    """What a row compares, whatever the size of student and batch, and the precision."""
    plain = (re.sub(r"batch \d+", "batch", row[key]) for key in ("name", "arm_a", "arm_b"))
    return (*(text.replace("vit_tiny", "vit_nano").replace("bf16", "fp32") for text in plain), row["of"])


@pytest.mark.parametrize("name", some(["attention", "inference", "step", "teacher", "memory"], 0, 1))
def test_a_suite_yields_the_rows_that_are_on_record(name: str, tmp_path: Path) -> None:
    machine = Machine(CPU, ("vit_nano",), tmp_path, batch_size=8, repetitions=2)
    rows = list(import_module(f"distill.bench.suites.{name}").measure(machine))
    assert rows
    for row in rows:
        assert row["ratio"] > 0
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["repetitions"] == 2
    assert len({(row["name"], row["arm_a"], row["arm_b"]) for row in rows}) == len(rows)
    recorded = {kind(row) for row in json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]}
    assert {kind(row) for row in rows} <= recorded


def test_a_shared_machine_is_compared_with_a_quiet_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    busy = [0]

    def speed(command: list[str], folder: Path) -> float:
        asked.append((command, busy[0]))
        return 100.0 if busy[0] == 0 else 60.0 if "train.threads" not in command[-1] else 20.0

    @contextmanager
    def processes(number: int) -> Iterator[None]:
        busy[0] = number
        yield

    monkeypatch.setattr(shared, "_images_per_second", speed)
    monkeypatch.setattr(shared, "_busy_processes", processes)
    machine = Machine(CPU, ("vit_nano",), tmp_path, batch_size=8, repetitions=2)
    assert [row["ratio"] for row in shared.measure(machine)] == pytest.approx([0.6, 1.0, 3.0])
    assert len(asked) == 2 * 4


@pytest.mark.soak
def test_the_speed_of_a_training_beside_a_busy_process(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "teachers" / "digits_cnn.yaml"
    with shared._busy_processes(1):
        assert shared._images_per_second([*shared.COMMAND, "train", str(recipe)], tmp_path / "run") > 0


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
    assert set(figures) == {"machine", "rows"}
    assert figures["machine"]["threads"] >= 1
    assert figures["machine"]["matrix_gflops"] == {}  # none of these rows is compared with it
    assert {"torch", "timm"} <= set(figures["machine"]["versions"])
    assert len(figures["rows"]) == 3
    printed, markdown = capsys.readouterr().out, path.with_suffix(".md").read_text(encoding="utf-8")
    for row in figures["rows"]:
        assert row["repetitions"] == 3
        assert f"{row['ratio']:.3f}" in printed
        assert f"{row['ratio']:.3f}" in markdown


def test_rows_are_written_as_they_come_and_the_time_may_be_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "figures.json"
    written: list[int] = []

    def measure(machine: Machine) -> Iterator[Row]:
        arms = [Arm(name, lambda: time.sleep(0.001)) for name in "ab"]
        times = machine.interleave(arms)
        for number in range(5):
            yield compare(f"row {number}", times, *arms, of="time")
            written.append(len(json.loads(path.read_text(encoding="utf-8"))["rows"]))
            if number == 2:
                monkeypatch.setattr(time, "monotonic", lambda: math.inf)

    monkeypatch.setattr("distill.bench.suites.augment.measure", measure)
    arguments = ["bench", "augment", "--device", "cpu", "--repetitions", "3", "--minutes", "1", "--json", str(path)]
    assert cli.main(arguments) == 0
    assert written == [1, 2, 3]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["repetitions"]) for row in rows] == [(f"row {number}", 3) for number in range(4)]
    assert "stopped in the suite augment" in capsys.readouterr().out


def test_only_rows_with_a_pattern_in_their_name_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "figures.json"
    arguments = ["bench", "augment", "--device", "cpu", "--repetitions", "2", "--json", str(path), "--only"]
    assert cli.main([*arguments, "deit's*32 PX"]) == 0
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["name"] == "DeiT's augmentation, 32 px, batch 128"
    assert cli.main([*arguments, "giraffe"]) == 2
    assert "giraffe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["startup", "attention", "augment", "inference", "memory", "pipeline", "shared", "step", "teacher"]
)
def test_a_suite_measures_nothing_of_which_no_row_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "_round", None)
    monkeypatch.setattr(shared, "_images_per_second", None)
    machine = Machine(CPU, ("vit_nano",), tmp_path, batch_size=8, repetitions=2, only="giraffe")
    assert list(import_module(f"distill.bench.suites.{name}").measure(machine)) == []
    assert machine.matrix_rates == {}


@pytest.mark.parametrize(
    "arguments",
    [["--repetitions", "1"], ["nonsense"], ["--size", "giant"], ["augment", "--json", "nowhere/at/all.json"]],
)
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


@pytest.mark.parametrize("max_area", [3, (2, 2)])
def test_summed_area_tables_compute_area_attention(max_area: int | tuple[int, int]) -> None:
    query, key, value = torch.randn(3, 2, 2, 14, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    areas = {"max_area": max_area, "grid": (3, 4), "num_prefix_tokens": 2}
    expected = area_attention(query, key, value, **areas)  # type: ignore[arg-type]
    assert torch.allclose(summed_area_attention(query, key, value, **areas), expected)  # type: ignore[arg-type]


def test_the_peer_trains_the_same_student() -> None:
    student = arms.Student(batch_size=8)
    images = PilImages(np.random.default_rng(0).integers(256, size=(32, 32, 32, 3), dtype=np.uint8))
    peer = Peer(student, CifarResNet(20), images, CPU, workers=1)
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    batches = peer.batches()
    for _ in range(2):
        peer.step(next(batches))
    after = list(peer.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True) if new.ndim > 1)
    ours = arms.build_trainer(student.recipe(), arms.accelerator("fp32"))
    assert sum(parameter.numel() for parameter in after) == sum(
        parameter.numel() for parameter in ours.student.parameters()
    )


@pytest.mark.soak
def test_two_processes_train_together() -> None:
    assert 0 < seconds_an_image(processes=2, threads=1, steps=1) < 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_of_memory_is_seen_though_it_is_gone_at_the_end() -> None:
    size = 256 << 20  # beside what the interpreter frees and takes at the same time
    program = (
        "import torch; from distill.bench.suites.memory import peak\n"
        f"print(peak(lambda: torch.ones({size} // 4).sum(), torch.device('cpu')))"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert float(child.stdout) == pytest.approx(size, rel=0.1)
