"""The real command with two CPU processes, beside the same with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import run
from distill.launching.exit_messages import EXIT_INTERRUPTED
from distill.launching.processes import bf16_instructions
from tests import warm
from tests.conftest import Counted, Toy, environment, some
from tests.students.helpers import KINDS

EVEN = (
    "student.drop_path=0",
    "train.gradient_accumulation=1",
    "train.max_steps=50",
    "train.epochs=9",
    "train.precision=fp32",
    "train.evaluate_every=9",
)


def launch(processes: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch distill/train.py` with so many CPU processes (DESIGN.md and accelerate's issue 2741 say why
    like this).
    """
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1", "--cpu"]
    script = Path(__file__).resolve().parents[2] / "distill" / "train.py"
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_machines", "1", "--main_process_port",
        "0",
         "--mixed_precision", "no", "--dynamo_backend", "no", str(script), *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("processes")
    paths = {}
    for processes in (1, 2):
        paths[processes] = folder / str(processes)
        result = launch(processes, toy.recipe, "--out", paths[processes], *EVEN, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr
        if processes == 2:
            assert result.stdout.count("student  ") + result.stderr.count("student  ") == 1, "one process speaks"
    return paths


def test_there_are_two(runs: dict[int, Path]) -> None:
    for processes, path in runs.items():
        environment = json.loads((path / "environment.json").read_text())
        assert environment["processes"] == processes
        assert environment["threads"] >= 1


def test_the_losses_agree_over_50_steps(runs: dict[int, Path], counted: Counted) -> None:
    one, two = (list(run.read_metrics(path, "train")) for path in runs.values())
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 51))
    for key in ("loss", "loss/label", "loss/hard", "loss/soft", "lr"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], abs=1e-5), key
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)]
    counted("losses of 2 x B and 1 x 2B", done=sum(gap <= 1e-5 for gap in gaps), of=50, difference=max(gaps))
    for line in two:
        parts = 0.5 * line["loss/label"] + 0.25 * line["loss/hard"] + 0.25 * line["loss/soft"]
        assert line["loss"] == pytest.approx(parts, abs=1e-6)


def test_evaluation_is_exact(runs: dict[int, Path]) -> None:
    one, two = (load_file(path / "predictions.safetensors") for path in runs.values())
    assert torch.equal(one["labels"], two["labels"])
    assert one["student.fused"].shape == two["student.fused"].shape == (50, 4)
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-3), key
    assert torch.allclose(one["teacher"], two["teacher"], atol=1e-5)
    counts = [
        [(line["student/top1"], line["agreement"]) for line in run.read_metrics(path, "eval")] for path in runs.values()
    ]
    assert counts[0] == counts[1]


def test_one_set_of_files(runs: dict[int, Path]) -> None:
    names = [
        sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_symlink())
        for path in runs.values()
    ]
    assert names[0] == names[1]
    assert [event["event"] for event in map(json.loads, (runs[2] / "metrics.jsonl").read_text().splitlines())].count(
        "start"
    ) == 1


def test_two_go_on_where_one_stopped(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", toy.recipe, "--out", out, *EVEN]
    stopped = warm.launch([*arguments, "train.max_minutes=0.0001"], cwd=tmp_path)
    assert stopped.wait() == [EXIT_INTERRUPTED], stopped.output
    status = run.read_status(out)
    assert status["state"] == "interrupted"
    assert "time limit" in status["reason"]
    finished = warm.launch([*arguments, "--resume", "auto"], cwd=tmp_path, processes=2)
    assert finished.wait() == [0, 0], finished.output
    assert run.read_status(out)["state"] == "finished"
    steps = [line["step"] for line in run.read_metrics(out, "train")]
    assert steps == list(range(1, 51))


@pytest.mark.parametrize("kind", some(["refiner, shared", "area", "performer"]))
def test_growing_images_have_the_same_losses(toy: Toy, tmp_path: Path, kind: str) -> None:
    """Of a refiner about the same: its batch norms' statistics are those of each process's images."""
    student = [] if kind == "area" else [f"student.attention={json.dumps(KINDS[kind])}"]
    arguments = ["train", toy.recipe, *EVEN, "train.max_steps=6", "student.patch_size=2", "report.analysis=none",
                 "data.growth.start=4", "data.growth.until=0.05", "distill=[{method: guide}]", *student]  # fmt: skip
    losses = []
    for processes in (1, 2):
        done = warm.launch([*arguments, "--out", str(processes)], cwd=tmp_path, processes=processes)
        assert done.wait() == [0] * processes, done.output
        losses.append([line["loss"] for line in run.read_metrics(tmp_path / str(processes), "train")])
    near = 0.1 if "refiner" in kind else 1e-5
    assert losses[1] == pytest.approx(losses[0], abs=near)  # the first three steps of 54 are on small images


def test_a_teacher_of_logits_may_end(toy: Toy, tmp_path: Path) -> None:
    """Its head learns from the labels then, in all processes."""
    method = "distill=[{method: soft, weight: {start: 1.0, end: 0.0, until: 0.05}}]"  # three steps of 54
    arguments = ["train", toy.recipe, *EVEN, "train.max_steps=6", "report.analysis=none", method]
    losses = []
    for processes in (1, 2):
        done = warm.launch([*arguments, "--out", str(processes)], cwd=tmp_path, processes=processes)
        assert done.wait() == [0] * processes, done.output
        losses.append([line["loss"] for line in run.read_metrics(tmp_path / str(processes), "train")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.soak
def test_a_batch_that_does_not_divide_over_processes(toy: Toy, tmp_path: Path) -> None:
    result = launch(
        2, toy.recipe, "--out", tmp_path / "run", "train.batch_size=18", "train.gradient_accumulation=3", cwd=tmp_path
    )
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "train.batch_size" in result.stderr[result.stderr.index("error: ") :]
    assert not (tmp_path / "run").exists()


def test_bf16_runs_on_the_cpu(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", toy.recipe, "--out", out, "train.precision=bf16", "train.max_steps=3"]
    done = warm.launch(arguments, cwd=tmp_path, processes=2)
    assert done.wait() == [0, 0], done.output
    chosen, why = ("bf16", "with this CPU's") if bf16_instructions() else ("fp32", "instead of bf16")
    assert json.loads((out / "environment.json").read_text())["precision"] == chosen
    assert f"precision: {chosen}" in done.output
    assert done.output.count(why) == 1, "one process speaks"
    weights = load_file(out / "checkpoints" / "last" / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
