"""Guided runs in processes of their own, two of them beside one, and compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from tests.conftest import Toy
from tests.test_feature_guidance import recipe_of
from tests.test_resume import train_lines
from tests.test_step_speed import batches_of, take_steps, trainer_of
from tests.warm import launch


def test_two_processes_learn_what_one_does(toy: Toy, tmp_path: Path) -> None:
    settings = ["student.drop_path=0", "train.gradient_accumulation=1", "train.max_steps=12", "train.epochs=9",
                "train.ema=null", "distill=[{method: hard, weight: 0.25}, {method: guide}, {method: fitnet, "
                "projection: orthogonal, weight: {start: 0.001, end: 0, until: 0.15}}]"]  # fmt: skip
    lines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = launch(["train", toy.recipe, *settings, "--out", "run"], cwd=folder, processes=processes)
        assert done.wait(200) == [0] * processes, done.output
        lines.append(train_lines(folder / "run"))
    one, two = lines
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 13))
    assert [line["step"] for line in one if "loss/fitnet" in line] == list(range(1, 10)), "then it has ended"
    for key in ("loss", "loss/label", "loss/hard", "loss/guide"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], abs=1e-5), key
    ends = [checkpoint.read_tensors(tmp_path / name / "run" / "checkpoints" / "last", "methods") for name in "12"]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_dry_run_takes_a_guided_step(toy: Toy, tmp_path: Path) -> None:
    launched = launch(["train", toy.recipe, "distill=[{method: guide}]", "--dry-run"], cwd=tmp_path)
    assert launched.wait() == [0], launched.output
    assert re.search(r"first step  loss [1-9]\.\d+", launched.output)


@pytest.mark.soak
def test_compiled_with_maps_it_begins_as_eager(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without graph breaks; and shares, which take several backward passes, are right and harm no step. Neither the
    second micro-batch nor an evaluation at another size compiles again. The graphs run as they were traced; kernels
    are made in tests/test_compiled.py.
    """
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compile_in_place(module, backend="aot_eager", dynamic=False)
    )
    found: dict[bool, tuple[list[float], dict[str, float]]] = {}
    counters = torch._dynamo.utils.counters
    for compiled in (False, True):
        counters.clear()
        train = {"compile": compiled, "ema": None, "log_gradient_share": True, "log_every": 2}
        distill = [{"method": "hard"}, {"method": "guide"}]
        trainer = trainer_of(recipe_of(toy, distill=distill, student={"drop_path": 0.0}, train=train))
        batches, losses = batches_of(trainer), []
        for _ in range(4):
            take_steps(trainer, batches, 1)
            losses.append(trainer.accumulator.read(16)["loss"])
        found[compiled] = losses, {name: share.item() for name, share in trainer.gradient_shares.latest.items()}
        trainer.evaluator.predict(trainer.student, "validation")
        assert trainer.teacher is not None
        trainer.teacher(torch.rand(3, 3, 8, 8))
        # Student and teacher; the step that is not compiled made no third.
        assert counters["stats"]["unique_graphs"] == (2 if compiled else 0)
        assert not counters["graph_break"]
    assert found[True][0][0] == pytest.approx(found[False][0][0], abs=1e-5)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-3)
