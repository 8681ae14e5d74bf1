"""Runs that learn from images without labels: losses, processes, resumption, the control and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import run
from distill.data import Batch
from distill.errors import Interrupted
from distill.features import Features
from distill.methods.base import Shapes
from distill.methods.hard import Options as Hard
from distill.recipe import from_mapping
from distill.teaching.source import StepIndex
from distill.training.task import Task
from tests import warm
from tests.conftest import Command, Toy
from tests.distributed.test_two_processes import EVEN
from tests.methods.helpers import build_methods, task_of
from tests.test_resume import go, train_lines

METHODS = [{"method": "hard"}, {"method": "guide"}]
SHARE = "data.unlabelled_share=0.6"  # three of eight pairs: one process has two of them, the other one


def _task(logits: Tensor, teacher: Tensor, number: float | None) -> Task:
    methods = build_methods([Hard(method="hard")], Shapes(num_classes=3))
    task = task_of(methods, {"cls": logits}, {}, Features({"cls": teacher}, {}), label_smoothing=0.1)
    task.labelled_images = number
    return task


def test_the_label_loss_is_of_the_labelled_images_alone() -> None:
    """Value and gradient, the mean over those of a global batch in uneven parts; the method's is of all images."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 12, 3, generator=generator).unbind()
    labels = torch.tensor([1, -1, 0, 2, 2, -1, -1, -1, -1, 0, -1, -1])  # 5 of 12: of each half 4 and 1
    targets = torch.nn.functional.one_hot(labels.clamp_min(0), 3).float() * (labels >= 0)[:, None]
    student = logits.clone().requires_grad_()
    total = torch.zeros(())
    parts: list[dict[str, Tensor]] = []
    for half in (slice(0, 6), slice(6, 12)):
        batch = Batch(torch.zeros(6, 3, 8, 8), targets[half], labels[half], torch.arange(12)[half])
        losses = _task(student[half], teacher[half], 5 / 2)(batch, StepIndex(0, 0), 0.5)
        total = total + losses.total / 2
        parts.append(losses.parts)
    total.backward()
    known = labels >= 0
    exact = logits.double().requires_grad_()
    smoothed = 0.9 * targets[known].double() + 0.1 / 3
    label = -(smoothed * exact[known].log_softmax(1)).sum(1).mean()
    hard = torch.nn.functional.nll_loss(exact.log_softmax(1), teacher.argmax(1))
    (label + hard).backward()
    assert sum(part["label"] for part in parts).item() / 2 == pytest.approx(label.item(), abs=1e-6)
    assert student.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-6, rtol=0)


def keys(**changes: Any) -> dict[str, Any]:
    return {"distill": METHODS, **changes}


def test_a_stopped_run_and_its_control_resume_bit_for_bit(toy: Toy, tmp_path: Path) -> None:
    """The control has as many steps, all of its images are labelled, and its first batch begins alike."""
    raw = toy.mapping(**keys(control=True, train={"max_steps": 12}))
    raw["data"] |= {"labelled": 24, "unlabelled_share": 0.5}
    recipe = from_mapping(raw, default_name="toy")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    go(recipe, whole, None)
    with pytest.raises(Interrupted):
        go(recipe, stopped, 11)  # in the middle of an epoch, of a pass over the labelled and one over the others
    go(recipe, stopped, None, resume="auto")
    for part in ("", "control"):
        one, other = whole / part, stopped / part
        assert train_lines(one) == train_lines(other)
        assert [line["epoch"] for line in train_lines(one)][8:] == [
            1.0,
            *(pytest.approx(n / 9, abs=1e-3) for n in (10, 11, 12)),
        ]
        exports = [(path / "export" / "model.safetensors").read_bytes() for path in (one, other)]
        assert exports[0] == exports[1]
    (check,) = run.read_metrics(whole, "control")
    assert check["equal_batches"] >= 1
    card = (whole / "export" / "README.md").read_text()
    assert "trained on the labelled images alone without the teacher" in card
    assert "unlabelled\\_images: 72" in card or "unlabelled_images: 72" in card
    assert run.read_status(whole)["training_images"] == {"labelled": 24, "unlabelled": 72}


@pytest.fixture(scope="module")
def more(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("more") / "more.safetensors"
    save_file({"images": load_file(toy.root / "toy.safetensors")["train.images"] ^ 1}, path)
    return path


def test_two_processes_and_what_a_run_says(toy: Toy, more: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(toy.mapping(**keys())))
    arguments = ["train", recipe, *EVEN, "train.max_steps=4", f"data.unlabelled={more}", SHARE]
    losses = []
    for processes in (1, 2):
        done = warm.launch(
            [*arguments, "--out", str(processes)], cwd=tmp_path, processes=processes, report=processes == 1
        )
        assert done.wait() == [0] * processes, done.output
        losses.append(
            [(line["loss/label"], line["loss"]) for line in run.read_metrics(tmp_path / str(processes), "train")]
        )
        assert done.output.count("96 of 224 training images") == 1
        assert f"128 images in {more}, 60 % of a batch" in " ".join(done.output.split())
    for one, two in zip(*losses, strict=True):
        assert two == pytest.approx(one, abs=2e-5)
    report = (tmp_path / "1" / "report.md").read_text()
    assert "96 labelled, 128 unlabelled" in report
    resolved = tmp_path / "1" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(str(more), str(tmp_path / "moved.safetensors")))
    evaluated = warm.launch(["evaluate", "1"], cwd=tmp_path)  # needs none of them
    assert evaluated.wait() == [0], evaluated.output


def test_other_images_than_a_run_began_with(toy: Toy, more: Path, tmp_path: Path, command: Command) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(more.read_bytes())
    raw = toy.mapping(**keys(data={"unlabelled": str(own)}))
    with pytest.raises(Interrupted):
        go(from_mapping(raw, default_name="r"), tmp_path / "run", 3)
    save_file({"images": load_file(own)["images"] ^ 2}, own)
    (tmp_path / "r.yaml").write_text(json.dumps(raw))
    done = command("train", "r.yaml", "--out", "run", "--resume", "auto")
    assert done.returncode == 2
    assert "began with other images than those of data.unlabelled now" in " ".join(done.stderr.split())


def test_a_plain_recipe_of_the_labelled_part_is_the_control(toy: Toy, tmp_path: Path) -> None:
    raw = toy.mapping(**keys(control=True, train={"max_steps": 3}))
    raw["data"] |= {"labelled": 24}
    go(from_mapping(raw, default_name="toy"), tmp_path / "both", None)
    plain = raw | {"teacher": None, "distill": [], "control": False, "label_weight": 1.0}
    go(from_mapping(plain, default_name="plain"), tmp_path / "plain", None)
    exports = [
        load_file(path / "export" / "model.safetensors") for path in (tmp_path / "both" / "control", tmp_path / "plain")
    ]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(exports[0][key], exports[1][key]) for key in exports[0])
