"""Compiled networks: the losses, gradients and weights of eager ones, and nothing compiled in the middle of a run.

On a CPU most of it runs what was captured as it is: the kernels of a student take minutes to build.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import distill.exports.folder
from distill import checkpoint
from distill.errors import Interrupted
from distill.launching.determinism import set_deterministic
from distill.recipe import Recipe
from distill.run import Run, is_finished, read_metrics
from distill.students.attention.area import AreaAttention
from distill.trainer import Trainer
from distill.training.compilation import Compilation
from tests.conftest import DEVICES, Toy
from tests.students.helpers import KINDS
from tests.test_resume import go
from tests.test_step_speed import batches_of, take_steps, toy_recipe, trainer_of

GUIDED = [{"method": "hard"}, {"method": "guide"}]
GRAPHS = {"cpu": 2, "cuda": 3}
"""Of a step: student and teacher, and on CUDA the augmentation."""


@pytest.fixture
def captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU compile to the captured operators."""
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()


def compiled(toy: Toy, **changes: Any) -> Recipe:
    train = {"compile": True, "gradient_accumulation": 1} | changes.pop("train", {})
    return toy_recipe(toy, **{"distill": GUIDED, "train": train} | changes)


# Several backward passes


class ToyStudent(nn.Module):
    """Area attention and two heads, and nothing else that inductor would build kernels for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = AreaAttention(16, 2, max_area=2)
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        attended = self.attention(tokens)
        return [head(attended[:, index]) for index, head in enumerate(self.heads)]


def losses_of(model: nn.Module) -> list[Tensor]:
    """Of each head."""
    tokens = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [F.cross_entropy(logits, torch.arange(8) % 4) for logits in model(tokens)]


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of each head's loss, by a backward pass of its own through one forward pass, [parameters] each."""
    parameters, losses = list(model.parameters()), losses_of(model)
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in [*losses, *losses]
    ]
    return [torch.cat([gradient.flatten() for gradient in one]) for one in gradients]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_several_backward_passes_through_compiled_areas_are_right_or_refused() -> None:
    """In float64: in float32 eager gradients are off by more than what is to be seen. Code compiled for a backward pass
    that ends the graph may write over what was saved, and torch refuses it for one that does not: `GradientShares`
    takes an eager step.
    """
    expected = gradients_of(ToyStudent().double())
    # Which of the two forms a graph was compiled in first is kept on disk.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for kept in (True, False):
            torch.compiler.reset()
            model = ToyStudent().double()
            model.compile(dynamic=False)
            if kept:
                for ours, eager in zip(gradients_of(model), expected, strict=True):
                    assert (ours - eager).abs().max() < 1e-12 * eager.abs().max()
            else:
                torch.stack(losses_of(model)).sum().backward()
                with pytest.raises(RuntimeError, match="retain_graph=False"):
                    gradients_of(model)
                with torch.compiler.set_stance("force_eager"):
                    assert all(map(torch.equal, gradients_of(model), expected))


# Steps


def graph_launches(trainer: Trainer, batches: Iterator[Any]) -> int:
    """CUDA graphs that a step launches."""
    with torch.profiler.profile(activities=[*torch.profiler.supported_activities()]) as profile:
        take_steps(trainer, batches, 1)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")


@DEVICES
@pytest.mark.usefixtures("captured")
def test_compiled_steps_have_the_losses_of_eager_ones(toy: Toy, device: str) -> None:
    """With areas, guidance by feature maps, and shares of the gradients at every third step."""
    found: list[tuple[list[float], dict[str, float]]] = []
    for enabled in (False, True):
        train = {"compile": enabled, "log_gradient_share": True, "log_every": 3}
        trainer = trainer_of(compiled(toy, student={"drop_path": 0.0}, train=train))
        assert trainer.accelerator.device.type == device
        batches, losses = batches_of(trainer), []
        for _ in range(4):
            take_steps(trainer, batches, 1)
            losses.append(trainer.accumulator.read(16)["loss"])
        found.append((losses, {name: share.item() for name, share in trainer.gradient_shares.latest.items()}))
        assert counters["stats"]["unique_graphs"] == (GRAPHS[device] if enabled else 0)
    eager, ours = found
    assert ours[0][0] == pytest.approx(eager[0][0], abs=1e-5)
    assert ours[0] == pytest.approx(eager[0], rel=1e-4)
    assert ours[1] == pytest.approx(eager[1], rel=1e-3)
    assert set(ours[1]) == {"label", "hard", "guide"}
    assert not counters["graph_break"]
    assert trainer.compilation.graphs == (device == "cuda")
    if trainer.compilation.graphs:
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert graph_launches(trainer, batches) >= 3  # the teacher, and both passes of the student


@DEVICES
@pytest.mark.usefixtures("captured")
def test_new_random_features_compile_nothing_and_are_used(toy: Toy, device: str) -> None:
    found = []
    for enabled in (False, True):
        student = {"attention": KINDS["performer"] | {"redraw": 2}, "drop_path": 0.0}
        trainer = trainer_of(compiled(toy, student=student, train={"compile": enabled}))
        module, batches, losses, features = trainer.student.model.blocks[0].attn, batches_of(trainer), [], []
        for _ in range(4):
            features.append(module.features.clone())
            take_steps(trainer, batches, 1)
            losses.append(trainer.accumulator.read(16)["loss"])
        assert module.passes == 4
        assert [torch.equal(a, b) for a, b in itertools.pairwise(features)] == [True, False, True]
        found.append((losses, features))
        assert counters["stats"]["unique_graphs"] == (GRAPHS[device] if enabled else 0)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert not counters["graph_break"]


@DEVICES
@pytest.mark.usefixtures("captured")
def test_drop_path_and_batch_norm_resume_bit_for_bit_and_a_skipped_step_leaves_no_trace(
    toy: Toy, tmp_path: Path, device: str
) -> None:
    train = {"deterministic": True, "max_bad_steps": 5}
    recipe = compiled(toy, student={"stem": "conv", "drop_path": 0.5}, train=train)
    directory = Run(tmp_path, is_main=True)
    directory.checkpoints.mkdir()
    try:
        undisturbed = trainer_of(recipe)
        batches = batches_of(undisturbed)
        take_steps(undisturbed, batches, 2)
        before = {name: value.clone() for name, value in undisturbed.student.state_dict().items()}
        (spoiled,) = next(batches)
        spoiled.images[0] = float("nan")
        undisturbed.train_step([spoiled])
        undisturbed.progress.step += 1
        assert equal(undisturbed.student.state_dict(), before)
        assert any(name.endswith("running_mean") for name in before)
        undisturbed.save(directory)
        undisturbed.finish_saving()
        take_steps(undisturbed, batches, 2)
        ends = undisturbed.student.state_dict()
        assert not any(torch.equal(ends[name], before[name]) for name in before if name.endswith("running_mean"))
        resumed = trainer_of(recipe)
        resumed.restore(checkpoint.folder_of_step(directory.checkpoints, 3), directory)
        take_steps(resumed, batches_of(resumed), 2)
        assert equal(resumed.student.state_dict(), ends)
    finally:
        set_deterministic(False)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Runs


@DEVICES
@pytest.mark.usefixtures("captured")
def test_all_graphs_of_a_run_are_compiled_in_its_first_step(
    toy: Toy, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation of raw and averaged weights, mixing switched off, guidance that ends, a step for shares of the
    gradients, the cache's fingerprint, the test and the export compile nothing, and neither does a resumed run.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    if device == "cpu":  # the augmentation too
        monkeypatch.setattr(Compilation, "apply_to_augmentation", lambda self, augmenter: augmenter.compile())
    seen: list[int] = []
    step = Trainer.train_step

    def counted(trainer: Trainer, *arguments: Any) -> None:
        step(trainer, *arguments)
        seen.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Trainer, "train_step", counted)
    augment = {"crop_padding": 1, "hflip": True, "mixup": 0.8, "cutmix": 1.0, "mix_off_epoch": 1}
    ends = {"start": 1.0, "end": 0.0, "until": 0.5}
    recipe = compiled(
        toy,
        data={"augment": augment},
        teacher={"cache": True},
        distill=[{"method": "hard"}, {"method": "soft", "weight": ends}],
        train={"log_gradient_share": True, "log_every": 4, "max_steps": 14},
        report={"analysis": "none"},
    )
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 8)
    first = counters["stats"]["unique_graphs"]
    go(recipe, out, None, resume="auto")
    assert is_finished(out)
    assert len(list(read_metrics(out, "eval"))) == 2 * 3 + 1  # raw and averaged weights, and the test
    assert seen == [3] * 8 + [first + 3] * 6
    assert counters["stats"]["unique_graphs"] == first + 3 == 6


@DEVICES
@pytest.mark.usefixtures("captured")
def test_growing_images_compile_one_more_graph_whose_time_is_no_training(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    seen, ends = [], []
    step, end = Trainer.train_step, Trainer.end_compilation

    def counted(trainer: Trainer, *arguments: Any) -> None:
        step(trainer, *arguments)
        seen.append(counters["stats"]["unique_graphs"])

    def ended(trainer: Trainer) -> None:
        before = trainer.progress.training_seconds, trainer.progress.compilation_seconds
        end(trainer)
        ends.append((trainer.progress.step, *before, trainer.progress.compilation_seconds))

    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(Trainer, "end_compilation", ended)
    growth = {"data": {"growth": {"start": 4}}, "student": {"patch_size": 2}, "report": {"analysis": "none"}}
    go(compiled(toy, **growth, train={"log_every": 100, "max_steps": 14}), tmp_path / "run", None)
    graphs, steps = GRAPHS[device], 3 if device == "cuda" else 1
    assert seen == [graphs] * 9 + [graphs + 1] * 5
    (first, no_training, none, start), (second, training, compilation, both) = ends
    assert (first, second) == (steps, 9 + steps)
    assert no_training == none == 0 < training  # the steps at the first size
    assert compilation == start < both
