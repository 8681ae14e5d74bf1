"""What keeps a step fast: nothing in it waits for the device, its networks are compiled, the teacher's weights are cast
once, and the time spent waiting for data is known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import distill.data.rows
import distill.trainer
import distill.training.accumulator
from distill import checkpoint
from distill.data import Batch
from distill.inputs import InputContract
from distill.launching.processes import build_accelerator
from distill.pipeline import open_data
from distill.recipe import Recipe, from_mapping
from distill.recipe.schema import Train
from distill.run import Run
from distill.students import Student
from distill.teaching.source import Frozen
from distill.teaching.teachers import build_teacher
from distill.tracking import Tracking
from distill.trainer import Trainer
from distill.training import compilation
from distill.training.accumulator import MetricAccumulator
from distill.training.compilation import Compilation
from distill.training.task import Losses
from teachers import Ensemble, Teacher
from teachers.cifar_resnet import CifarResNet
from tests.conftest import Toy


def toy_recipe(toy: Toy, **changes: Any) -> Recipe:
    return from_mapping(toy.mapping(**changes), default_name="toy")


def trainer_of(recipe: Recipe) -> Trainer:
    accelerator = build_accelerator(recipe.train, Path())
    dataset = open_data(recipe, accelerator)
    trainer = Trainer(recipe, accelerator, dataset, build_teacher(recipe, dataset, accelerator))
    trainer.model.train()
    return trainer


def tracking_of(trainer: Trainer, directory: Run) -> Tracking:
    return Tracking(
        directory,
        trainer.recipe,
        trainer.accelerator,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
        stage="student",
        later_steps=0,
    )


def take_steps(trainer: Trainer, batches: Iterator[list[Batch]], number: int) -> None:
    for _ in range(number):
        trainer.train_step(next(batches))
        trainer.progress.step += 1


def batches_of(trainer: Trainer) -> Iterator[list[Batch]]:
    epoch, step = divmod(trainer.progress.step, trainer.steps_per_epoch)
    return trainer.accumulator.timed(trainer.dataset.training_batches(trainer.plan, epoch, step))


# No synchronisation

CALLS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}
OPERATORS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


class Calls(TorchFunctionMode):
    """Which calls in Python bring a tensor's content to the host, or would on another device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in CALLS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The same below Python: operators whose result is a number, or whose shape depends on values."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATORS:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


AUGMENT = {
    "crop_padding": 1, "hflip": True, "rand_augment": {}, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0
}  # fmt: skip
ALL_OPTIONS = {"data": {"augment": AUGMENT}, "optim": {"layer_decay": 0.8, "clip_grad": 0.5}, "train": {"ema": 0.9}}


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the paths of a device whose values the host does not have at hand."""
    monkeypatch.setattr(distill.data.rows, "picks_rows", lambda device: False)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_between_two_log_lines_waits_for_the_device(toy: Toy, precision: str) -> None:
    train = ALL_OPTIONS["train"] | {"precision": precision}
    trainer = trainer_of(toy_recipe(toy, **ALL_OPTIONS | {"train": train}))
    batches = batches_of(trainer)
    take_steps(trainer, batches, 2)
    found: list[str] = []
    with Calls(found), Operators(found):
        take_steps(trainer, batches, 3)
    assert found == []
    with Calls(found):
        trainer.accumulator.read(16)
    assert found == ["tolist"]


@pytest.mark.usefixtures("like_a_gpu")
def test_a_loss_that_waits_would_be_found(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(toy_recipe(toy))
    original = trainer.task.forward

    def waiting(*args: Any, **kwargs: Any) -> Losses:
        losses = original(*args, **kwargs)
        return losses._replace(total=losses.total * 2) if losses.total > 1e9 else losses

    monkeypatch.setattr(trainer.task, "forward", waiting)
    found: list[str] = []
    with Calls(found), Operators(found):
        take_steps(trainer, batches_of(trainer), 1)
    assert "__bool__" in found  # by the call
    assert {"_local_scalar_dense", "is_nonzero"} & set(found)  # by the operator


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_waits_for_a_gpu(toy: Toy, compiled: bool) -> None:
    train = ALL_OPTIONS["train"] | {"precision": "bf16", "compile": compiled, "gradient_accumulation": 1}
    trainer = trainer_of(toy_recipe(toy, **ALL_OPTIONS | {"train": train}))
    batches = batches_of(trainer)
    take_steps(trainer, batches, 3)  # the graphs are recorded in the second step
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(trainer, batches, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.accumulator.read(16)["loss"] > 0


# Compilation


@pytest.mark.parametrize(
    ("asked", "device", "enabled", "graphs"),
    [
        ({}, "cpu", False, False),
        ({}, "cuda", True, True),
        ({"compile": True}, "cpu", True, False),
        ({"compile": True}, "cuda", True, True),
        ({"compile": False}, "cuda", False, False),
        ({"gradient_accumulation": 2}, "cuda", True, False),
        ({"gradient_checkpointing": True}, "cuda", True, False),
    ],
)
def test_where_there_are_graphs(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], device: str, enabled: bool, graphs: bool
) -> None:
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    monkeypatch.setattr(compilation, "_missing", lambda: None)
    resolved = Compilation(Train(**asked), torch.device(device))
    calls: list[dict[str, Any]] = []
    resolved.apply(SimpleNamespace(compile=lambda **options: calls.append(options)))  # type: ignore[arg-type]
    assert calls == ([{"dynamic": False, "mode": "reduce-overhead" if graphs else None}] if enabled else [])
    resolved.apply_to_augmentation(SimpleNamespace(compile=lambda: calls.append({"augments": True})))  # type: ignore[arg-type]
    assert ({"augments": True} in calls) == (enabled and device == "cuda")
    resolved.begin_step()
    assert len(marks) == int(graphs)


def test_without_a_compiler_auto_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    monkeypatch.setattr(compilation, "has_triton", lambda: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level("INFO", logger="distill"):
        resolved = Compilation(Train(), torch.device("cuda"))
    assert not resolved.enabled
    assert not resolved.graphs
    assert "lacks a C compiler" in caplog.text
    assert Compilation(Train(compile=True), torch.device("cuda")).enabled, "who asks for it is told by the compiler"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda *_: "nowhere")
    assert "headers" in (compilation._missing() or "")
    monkeypatch.setattr(compilation, "has_triton", lambda: False)
    assert "Triton" in (compilation._missing() or "")


# The teacher's precision


class Standardised(nn.Conv2d):
    """A convolution that computes with its weights before it uses them."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(images, weight, self.bias)


def teachers_of_all_kinds() -> dict[str, Teacher]:
    contract = InputContract((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 16)
    torch.manual_seed(0)
    with_norms = timm.create_model("resnet10t", num_classes=4)
    standardised = nn.Sequential(
        Standardised(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    transformer = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=4
    )
    networks = {
        "cifar": CifarResNet(20, num_classes=4), "norms": with_norms, "standardised": standardised, "vit": transformer
    }  # fmt: skip
    found = {name: Teacher(name, network, contract, 4) for name, network in networks.items()}
    return found | {"ensemble": Ensemble([found["cifar"], found["norms"]], [1.0, 2.0])}


def test_weights_cast_once_give_the_logits_of_autocast_bit_for_bit() -> None:
    images = torch.rand(8, 3, 16, 16)
    for name, teacher in teachers_of_all_kinds().items():
        copied = teacher.with_weights_in(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = teacher(images), copied(images)
        assert torch.equal(found, expected), name
        assert found.dtype == torch.float32
        assert not torch.equal(teacher(images), expected), "the teacher itself stays in fp32"
        plain = [module for module in copied.modules() if type(module) in (nn.Conv2d, nn.Linear)]
        assert plain
        assert all(parameter.dtype == torch.bfloat16 for module in plain for parameter in module.parameters())
        assert not any(module.training for module in plain)
        assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_steps_ask_the_teacher_in_the_recipes_precision_and_predictions_in_fp32(toy: Toy) -> None:
    in_bf16 = trainer_of(toy_recipe(toy, train={"precision": "bf16"}))
    assert isinstance(in_bf16.source, Frozen)
    assert in_bf16.source.teacher.network.conv1.weight.dtype == torch.bfloat16
    assert in_bf16.teacher is not None
    assert {parameter.dtype for parameter in in_bf16.teacher.parameters()} == {torch.float32}
    in_fp32 = trainer_of(toy_recipe(toy))
    assert isinstance(in_fp32.source, Frozen)
    assert in_fp32.source.teacher is in_fp32.teacher
    without = trainer_of(toy_recipe(toy, distill=[]))
    assert without.source is None


# Waiting for data


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes only when told."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(distill.training.accumulator.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_share_of_the_time_spent_waiting(toy: Toy, clock: SimpleNamespace) -> None:
    window = MetricAccumulator(build_accelerator(toy_recipe(toy).train, Path()))

    def batches() -> Iterator[int]:
        for batch in range(3):
            clock.now += 2.0
            yield batch

    for _ in window.timed(batches()):
        clock.now += 6.0
        window.add(torch.tensor(1.0), {"label": torch.tensor(2.0)})
        window.step(torch.tensor(False))
    with window.paused():
        clock.now += 100.0
        assert window.take_seconds() == pytest.approx(24.0)
        clock.now += 100.0
    assert window.take_seconds() == pytest.approx(0.0)
    values = window.read(16)
    assert values == pytest.approx({"loss": 1.0, "loss/label": 2.0, "images_per_second": 2.0, "data_wait": 0.25})
    # A device that still computes when the batch arrives has waited for nothing.
    window._step_done = SimpleNamespace(query=lambda: False, record=lambda: None)  # type: ignore[assignment]
    for _ in window.timed(batches()):
        clock.now += 6.0
        window.add(torch.tensor(1.0), {})
        window.step(torch.tensor(False))
    assert window.read(16)["data_wait"] == 0.0
    # While the first batch is waited for, a GPU's augmentation is compiled.
    window._step_done = SimpleNamespace(query=lambda: True, record=lambda: None)  # type: ignore[assignment]
    window._counts_waiting = False
    for _ in window.timed(batches()):
        clock.now += 6.0
        window.add(torch.tensor(1.0), {})
        window.step(torch.tensor(False))
    assert window.read(16)["data_wait"] == pytest.approx(2 * 2.0 / 24.0)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stream_that_is_waited_for_says_so_once(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    data = {}
    if streamed:
        images = load_file(toy.root / "toy.safetensors")["train.images"]
        for split in ("train", "test"):
            for index in range(32):
                file = tmp_path / "set" / split / f"class{index % 4}" / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(file)
        data = {"name": "folder", "root": str(tmp_path / "set"), "stream": True, "workers": 0}
    monkeypatch.setattr(distill.trainer, "LOADER_BOUND", -1.0)
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    trainer = trainer_of(toy_recipe(toy, data=data, train={"batch_size": 8, "max_steps": 3}))
    directory = Run(tmp_path / "run", is_main=True)
    directory.path.mkdir()
    tracking = tracking_of(trainer, directory)
    batches = batches_of(trainer)
    with caplog.at_level("WARNING", "distill"):
        for _ in range(2):
            take_steps(trainer, batches, 1)
            trainer.log(tracking)
    notes = [record.getMessage() for record in caplog.records if "waiting for data" in record.getMessage()]
    assert len(notes) == int(streamed)
    assert all("data.workers" in note for note in notes)


# Muon


def test_muon_resumes_bit_for_bit(toy: Toy, tmp_path: Path) -> None:
    recipe = toy_recipe(toy, optim={"name": "nmuon", "momentum": 0.95, "layer_decay": 0.8, "lr": 0.01})
    directory = Run(tmp_path, is_main=True)
    directory.checkpoints.mkdir()
    undisturbed, resumed = trainer_of(recipe), trainer_of(recipe)
    take_steps(undisturbed, batches_of(undisturbed), 2)
    undisturbed.save(directory)
    undisturbed.finish_saving()
    take_steps(undisturbed, batches_of(undisturbed), 2)
    resumed.restore(checkpoint.folder_of_step(directory.checkpoints, 2), directory)
    take_steps(resumed, batches_of(resumed), 2)
    states = [trainer.student.state_dict() for trainer in (undisturbed, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (undisturbed, resumed)]
    assert len(moments[0]) == len(list(undisturbed.student.parameters()))
    assert {bool(state["use_muon"]) for state in moments[0].values()} == {True, False}
    for key, state in moments[0].items():
        assert state.keys() == moments[1][key].keys()
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(moments[1][key][name])) for name in state)


def test_a_student_is_compiled_for_its_calls_only(toy: Toy) -> None:
    """Evaluation, export and the moving average go by `logits` or by a copy made before."""
    calls: list[str] = []
    student = trainer_of(toy_recipe(toy)).student
    student._compiled_call_impl = lambda images: calls.append("compiled") or Student.forward(student, images)
    images = torch.rand(2, 3, 8, 8)
    student.logits(images)
    assert calls == []
    student(images)
    assert calls == ["compiled"]
