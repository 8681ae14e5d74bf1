"""NaN and inf in one process's loss or gradients: no process applies the update, and a run that has only such steps
fails, with a checkpoint from before them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils._pytree import tree_leaves

import distill.trainer
from distill import checkpoint, run
from distill.data import Batch, BatchPlan
from distill.files.digests import state_digest
from distill.launching.processes import build_accelerator
from distill.pipeline import open_data
from distill.recipe.schema import Train
from distill.teaching.logit_file import LogitFile
from distill.trainer import Trainer
from distill.training.nonfinite import NonFiniteSteps
from distill.training.task import Losses, Task
from tests.conftest import DEVICES, Counted, Toy
from tests.test_step_speed import batches_of, take_steps, toy_recipe, trainer_of
from tests.warm import launch

NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF)
# What becomes of an image, is the loss or added to it, or stands in this process's gradients before they are averaged
# or after it.
PLACES = ("images", "loss", "added", "own gradients", "gradients")
Injection = tuple[int, int, str, float]
"""Process, step (from 0), place and value."""


def inject(injections: list[Injection]) -> None:
    """Let this process's steps go wrong as listed, and note its weights after each; the code under test knows nothing
    of it.
    """
    rank = int(os.environ.get("RANK", "0"))
    mine = {step: (place, value) for process, step, place, value in injections if process == rank}
    train_step, forward, backward = Trainer.train_step, Task.forward, Accelerator.backward
    now: dict[str, Any] = {}

    def step(trainer: Trainer, micro_batches: Sequence[Batch]) -> None:
        now["place"], now["value"] = mine.get(trainer.progress.step, ("", 0.0))
        now["bias"] = trainer.student.model.head.bias
        if now["place"] == "images":
            micro_batches[0].images[0] = now["value"]
        train_step(trainer, micro_batches)
        with Path(f"digests-{rank}").open("a") as file:
            file.write(f"{trainer.progress.step} {state_digest(trainer.student.state_dict())}\n")

    def losses(*args: Any, **kwargs: Any) -> Losses:
        total, parts = forward(*args, **kwargs)
        factor, summand = now["place"] == "loss", now["place"] == "added"
        return Losses(total * (now["value"] if factor else 1.0) + (now["value"] if summand else 0.0), parts)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.tensor([0]), now["value"])

    def back(accelerator: Accelerator, total: Tensor, **kwargs: Any) -> None:
        handle = now["bias"].register_hook(spoil) if now["place"] == "own gradients" else None
        backward(accelerator, total, **kwargs)
        if handle is not None:
            handle.remove()
        if now["place"] == "gradients":
            now["bias"].grad[0] = now["value"]

    Trainer.train_step, Task.forward, Accelerator.backward = step, losses, back  # type: ignore[method-assign]


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[Injection]], None]:
    """`inject`, taken back at the end of the test."""
    monkeypatch.chdir(tmp_path)
    for owner, name in ((Trainer, "train_step"), (Task, "forward"), (Accelerator, "backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return inject


def everything(trainer: Trainer) -> list[Tensor]:
    """Copies of weights, batch statistics, moving average and the optimizer's state."""
    assert trainer.ema is not None
    state = trainer.optimizer.state_dict()["state"].values()
    tensors = [
        *trainer.student.state_dict().values(),
        *trainer.ema.module.state_dict().values(),
        *(leaf for leaf in tree_leaves(list(state)) if isinstance(leaf, Tensor)),
    ]
    return [tensor.clone() for tensor in tensors]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


class Drawing(torch.optim.Optimizer):
    """Draws, and has tensors in lists, as timm's Kron, which takes gigabytes for it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    factors = self.state[parameter].setdefault("factors", [torch.zeros_like(parameter)])
                    factors[0] += parameter.grad * torch.rand_like(parameter)
                    parameter -= group["lr"] * factors[0]


def draw() -> None:
    distill.trainer.build_optimizer = lambda _, model, *__: Drawing(model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nmuon", "adafactor", "laprop", "drawing"])
def test_a_skipped_step_leaves_no_trace(
    toy: Toy, injected: Callable[[list[Injection]], None], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    if optimizer == "drawing":
        monkeypatch.setattr(distill.trainer, "build_optimizer", distill.trainer.build_optimizer)
        draw()
    recipe = toy_recipe(
        toy,
        teacher=None,
        distill=[],
        student={"stem": "conv", "attention": {"kind": "standard"}},
        optim={} if optimizer == "drawing" else {"name": optimizer},
        train={"max_bad_steps": 5},
    )
    trainer = trainer_of(recipe)
    bad: dict[int, tuple[str, float]] = {
        0: ("loss", NAN), 1: ("images", NAN), 3: ("added", INF), 4: ("gradients", -INF)
    }  # fmt: skip
    injected([(0, step, place, value) for step, (place, value) in bad.items()])
    batches = batches_of(trainer)
    for step in range(6):
        before = everything(trainer)
        take_steps(trainer, batches, 1)
        assert equal(before, everything(trainer)) == (step in bad), step
    trainer.read_skipped()
    values = trainer.accumulator.read(16)
    assert values["bad_steps"] == 4
    assert math.isfinite(values["loss"])


@pytest.mark.parametrize("build", [Drawing, partial(torch.optim.AdamW, fused=True)], ids=["drawing", "fused"])
def test_a_parameter_may_get_its_first_gradient_later(build: Callable[..., torch.optim.Optimizer]) -> None:
    """Also in a step that is left out, in which torch's fused optimizers make its state all the same."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    optimizer = build(layers.parameters())
    guard = NonFiniteSteps(build_accelerator(Train(), Path()), layers, layers, optimizer)
    for step, (count, factor) in enumerate([(1, 1.0), (2, NAN), (2, 1.0)]):
        before = [parameter.clone() for parameter in layers.parameters()]
        loss = factor * torch.stack([layer(torch.ones(1, 2)).sum() for layer in layers[:count]]).sum()
        loss.backward()
        guard.begin_step()
        guard.check(step, [loss.detach()], [torch.tensor([0])])
        guard.step()
        optimizer.zero_grad()
        changed = [not torch.equal(*pair) for pair in zip(before, layers.parameters(), strict=True)]
        assert changed == [step != 1] * 2 + [step == 2] * 2
        assert step == 1 or len(optimizer.state) == 2 * count
    assert all(parameter.isfinite().all() for parameter in layers.parameters())


@DEVICES
def test_a_scaler_skips_it_and_only_what_no_scale_would_cure_counts(
    toy: Toy, injected: Callable[[list[Injection]], None], device: str
) -> None:
    """In fp16 under CUDA graphs, which a CPU rehearses in fp32 and without them."""
    # Before the trainer: under fp16 accelerate keeps the forward pass that it finds.
    injected([(0, 1, "gradients", INF), (0, 2, "loss", NAN), (0, 4, "gradients", NAN), (0, 5, "gradients", NAN)])
    train = {"max_bad_steps": 5, "gradient_accumulation": 1, "precision": {"cpu": "fp32", "cuda": "fp16"}[device]}
    trainer = trainer_of(toy_recipe(toy, optim={"clip_grad": None}, train=train))
    assert trainer.compilation.graphs == (device == "cuda")
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=1000)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.nonfinite = NonFiniteSteps(trainer.accelerator, trainer.model, trainer.student, trainer.optimizer)
    batches = batches_of(trainer)
    scales = []
    for step in range(6):
        before = everything(trainer)
        take_steps(trainer, batches, 1)
        scales.append(scaler.get_scale())
        assert equal(before, everything(trainer)) == (step in (1, 2, 4, 5)), step
    assert scales == [4.0, 2.0, 1.0, 1.0, 0.5, 0.25]
    trainer.read_skipped()
    assert trainer.accumulator.sums is not None
    loss = trainer.accumulator.sums[0].item() / 2  # of the steps 0 and 3
    values = trainer.accumulator.read(16)
    assert values["loss"] == pytest.approx(loss)
    assert values["bad_steps"] == 2  # the loss, and gradients that were not finite at the scale 0.5


def test_a_first_step_that_overflows_leaves_no_memory_that_nobody_filled(
    toy: Toy, injected: Callable[[list[Injection]], None]
) -> None:
    """torch's fused SGD makes its momentum as empty memory, also in a step that the scaler has it leave out."""
    trainer = trainer_of(toy_recipe(toy, optim={"name": "sgd", "clip_grad": None}, train={"max_bad_steps": 5}))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.nonfinite = NonFiniteSteps(trainer.accelerator, trainer.model, trainer.student, trainer.optimizer)
    injected([(0, 0, "gradients", INF)])
    batches = batches_of(trainer)
    before = everything(trainer)
    take_steps(trainer, batches, 1)
    assert not trainer.optimizer.optimizer.state
    assert equal(before, everything(trainer))
    take_steps(trainer, batches, 1)
    assert trainer.optimizer.optimizer.state
    assert all(value.isfinite().all() for value in everything(trainer))


def chances(number: int, steps: int) -> list[Injection]:
    """One process's value in each of so many steps, drawn with a fixed seed; no two of these in a row."""
    chance = random.Random(0)
    chosen = chance.sample(range(0, steps, 2), number)
    return [(chance.randrange(2), step, PLACES[at % 5], chance.choice(VALUES)) for at, step in enumerate(chosen)]


@pytest.mark.parametrize(
    ("number", "steps"), [(5, 12), pytest.param(100, 202, marks=pytest.mark.soak)], ids=["5", "100"]
)
def test_no_process_applies_what_one_of_them_spoils(
    toy: Toy, tmp_path: Path, counted: Counted, number: int, steps: int
) -> None:
    out = tmp_path / "run"
    often = (f"train.epochs={steps}", f"train.max_steps={steps}", "train.checkpoint_every=1",
             "train.keep_checkpoints=1000")  # fmt: skip
    lasting: list[Injection] = [(1, step, "own gradients", NAN) for step in range(steps - 2, steps)]
    injections = chances(number, steps - 2) + lasting
    arguments = (toy.recipe, "--out", out, *often, "train.max_bad_steps=2")
    launched = launch(["train", *arguments], cwd=tmp_path, processes=2, before=partial(inject, injections))
    codes = launched.wait(600)
    assert codes == [3, 3], launched.output

    digests = [(tmp_path / f"digests-{rank}").read_text() for rank in range(2)]
    assert digests[0] == digests[1], "the processes have the same weights after every step"
    kept = 0
    for _, step, *_ in injections[:number]:
        if step == 0:
            kept += 1
            continue
        folders = [checkpoint.folder_of_step(out / "checkpoints", at) for at in (step, step + 1)]
        for folder in folders:
            checkpoint.verify(folder)
        model, ema = ([list(checkpoint.read_tensors(at, stem).values()) for at in folders] for stem in ("model", "ema"))
        moments = [
            [torch.as_tensor(value) for values in checkpoint.read_optimizer(at)["state"].values()
             for value in values.values()]
            for at in folders
        ]  # fmt: skip
        kept += equal(*model) and equal(*ema) and equal(*moments)
    counted("updates that are not finite leave no trace", done=kept, of=number)

    lines = list(run.read_metrics(out, "train"))
    assert sum(line.get("bad_steps", 0) for line in lines) == number + 1  # and the last but one
    assert all(math.isfinite(line.get("loss", 0.0)) for line in lines)
    status = run.read_status(out)
    assert status["state"] == "failed"
    reason = status["reason"]
    assert f"steps {steps - 1} to {steps}" in reason
    indices = samples_of(toy, rank=1, step=steps - 1)
    assert f"process 1 (step {steps}, samples {', '.join(map(str, indices))})" in reason
    assert "process 0 (" not in reason
    assert reason in launched.output.replace("\n", " ") or reason.splitlines()[0] in launched.output
    assert "Traceback" not in launched.output
    resumed = launch(["train", *arguments, "--resume", "auto"], cwd=tmp_path)
    assert resumed.wait() == [0], resumed.output
    assert run.is_finished(out)


def inject_nothing_and_draw() -> None:
    inject([])
    draw()


def test_processes_draw_alike_for_an_optimizer_that_draws(toy: Toy, tmp_path: Path) -> None:
    short = ("student.drop_path=0.1", "train.max_steps=4", "--out", "run")
    launched = launch(["train", toy.recipe, *short], cwd=tmp_path, processes=2, before=inject_nothing_and_draw)
    assert launched.wait() == [0, 0], launched.output
    digests = [(tmp_path / f"digests-{rank}").read_text().splitlines() for rank in range(2)]
    assert len(digests[0]) == 4
    assert digests[0] == digests[1]


def samples_of(toy: Toy, *, rank: int, step: int) -> list[int]:
    """The training samples of a process in a step (from 0), from the plan."""
    recipe = toy_recipe(toy)
    dataset = open_data(recipe, build_accelerator(recipe.train, Path()))
    plan = BatchPlan(seed=recipe.seed, batch_size=16, accumulation=2, num_processes=2, process_index=rank)
    epoch, first = divmod(step, plan.steps_per_epoch(dataset.info.sizes["train"]))
    batches = next(dataset.training_batches(plan, epoch, first))
    return torch.cat([batch.indices for batch in batches]).tolist()


def test_logits_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    file = LogitFile(tmp_path / "x.logits", "ab" * 32, epochs=1, samples=4, classes=3)
    file.make("{}")
    file.open()
    logits = np.array([[1, 2, 3], [NAN, 1, 2], [0, 0, 0], [1, INF, 2]], np.float16)
    file.write([(0, 0, logits)])
    stored, found = file.read(0, slice(0, 4))
    assert found.tolist() == [True, False, True, False]
    assert np.array_equal(stored[found], logits[found])
