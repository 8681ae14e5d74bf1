"""The student's own moving average as its teacher: in steps, in checkpoints and in recipes."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.data import Batch
from distill.errors import InputError, Interrupted
from distill.exports.folder import load_export
from distill.features import Features
from distill.methods.base import Method, Shapes, StepInputs
from distill.options import MethodOptions, Needs
from distill.recipe import Recipe
from distill.recipe.loading import from_mapping
from distill.recipe.schema import AverageTeacher
from distill.students.student import Student
from distill.teaching.moving_average import MovingAverage
from distill.teaching.source import StepIndex
from distill.trainer import Trainer
from distill.training.task import Task
from tests.conftest import Toy
from tests.students.test_embedding import student_of
from tests.test_resume import go, train_lines
from tests.test_step_speed import batches_of, take_steps, trainer_of
from tests.warm import launch

VIEWS = [
    {"kind": "global", "count": 2, "size": 8, "blur": 0.0},
    {"kind": "local", "count": 3, "size": 4, "scale": [0.2, 0.5], "blur": 0.0},
]
SMALL = {"prototypes": 16, "hidden": 12, "bottleneck": 8, "temperature_warmup_epochs": 2}
DINO = {"method": "dino", **SMALL}
SHORT = {"ema": None, "epochs": 2, "max_steps": 9}


def mapping(
    toy: Toy, *distill: dict[str, Any], teacher: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """The toy recipe with views and without labels."""
    raw = toy.mapping(**{"label_weight": 0.0, "distill": list(distill or [DINO]), "train": {"ema": None}} | changes)
    raw["data"] |= {"augment": {}, "views": VIEWS}
    raw["teacher"] = teacher or {"ema": {"momentum": 0.9}}
    return raw


def recipe_of(toy: Toy, *distill: dict[str, Any], **changes: Any) -> Recipe:
    return from_mapping(mapping(toy, *distill, **changes), default_name="toy")


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the average, its batch statistics, heads, their averages and centres."""
    assert trainer.averaged is not None
    tensors = {f"average.{name}": value for name, value in trainer.averaged.state_dict().items()}
    tensors |= {f"methods.{name}": value for name, value in trainer.task.methods.state_dict().items()}
    return {name: value.clone() for name, value in tensors.items()}


# Steps


@pytest.mark.parametrize("model", ["vit_nano", "test_resnet"])
def test_the_average_follows_the_parameters_and_has_its_own_buffers(toy: Toy, model: str) -> None:
    """Student and heads, by the published schedule; float64 beside it."""
    student = {"model": model} if model == "vit_nano" else {"model": model, "patch_size": None, "attention": {}}
    size = {} if model == "vit_nano" else {"data": {"resolution": 32}}
    raw = mapping(toy, student=student, **size)
    if model != "vit_nano":
        raw["student"].pop("attention")
        raw["data"]["views"] = [{**VIEWS[0], "size": 32}, {**VIEWS[1], "size": 16}]
    trainer = trainer_of(from_mapping(raw))
    assert trainer.average is not None
    assert trainer.averaged is not None
    pairs = [(trainer.averaged, trainer.student), *trainer.task.methods["dino"].averaged()]
    values = [
        value for average, module in pairs for value in zip(average.parameters(), module.parameters(), strict=True)
    ]
    expected = [average.double() for average, _ in values]
    assert all(torch.equal(average, value) for average, value in values), "it starts as the student"
    before = {name: buffer.clone() for name, buffer in trainer.averaged.named_buffers()}
    batches = batches_of(trainer)
    for step in range(3):
        take_steps(trainer, batches, 1)
        momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / trainer.schedule_steps) + 1) / 2
        assert trainer.average.momentum(step) == pytest.approx(momentum)
        expected = [momentum * e + (1 - momentum) * v.double() for e, (_, v) in zip(expected, values, strict=True)]
        for exact, (average, _) in zip(expected, values, strict=True):
            torch.testing.assert_close(average.double(), exact, rtol=1e-5, atol=1e-7)
    assert not any(average.requires_grad or average.grad is not None for average, _ in values)
    assert any(not torch.equal(average, value) for average, value in values)
    statistics = {name: buffer for name, buffer in trainer.averaged.named_buffers() if "running" in name}
    assert bool(statistics) == (model != "vit_nano")
    own = dict(trainer.student.named_buffers())
    for name, buffer in statistics.items():
        assert not torch.equal(buffer, before[name])
        assert not torch.equal(buffer, own[name])
    assert trainer.averaged.training


def test_the_average_ends_as_the_run_does() -> None:
    student = student_of(0, patch_size=8)
    average = MovingAverage(student, AverageTeacher(momentum=0.996, momentum_end=0.999), total_steps=10)
    assert [average.momentum(step) for step in (0, 5, 10)] == pytest.approx([0.996, 0.9975, 0.999])


def test_the_average_has_no_drop_path_and_no_gradients() -> None:
    student = student_of(0, patch_size=8, drop_path=0.9).train()
    average = MovingAverage(student, AverageTeacher(), total_steps=10)
    views = torch.rand(2, 4, 3, 32, 32).unbind()
    average.student.eval()  # as an evaluation leaves it
    answers = [average.ask(views, StepIndex(0, 0)) for _ in range(2)]
    assert average.student.training
    plain = student_of(0, patch_size=8).train()
    plain.load_state_dict(student.state_dict())
    for view, one, other in zip(views, *answers, strict=True):
        expected = plain(view, embed=True)
        for found in (one, other):
            assert found.embedding is not None
            assert not found.embedding.requires_grad
            torch.testing.assert_close(found.embedding, expected.embedding.detach())
            torch.testing.assert_close(found.regions, expected.regions.detach())
    assert not torch.allclose(student(views[0], embed=True).embedding, student(views[0], embed=True).embedding)


def test_what_attention_does_not_average_is_the_students(toy: Toy) -> None:
    """Random features, drawn again on the way."""
    attention = {"kind": "performer", "features": 8, "redraw": 3, "blocks": [0, 1]}
    raw = mapping(toy)
    raw["student"]["attention"] = attention
    trainer = trainer_of(from_mapping(raw))
    assert trainer.averaged is not None
    first = trainer.averaged.state_dict()["model.blocks.0.attn.features"].clone()
    take_steps(trainer, batches_of(trainer), 3)
    own, averaged = trainer.student.state_dict(), trainer.averaged.state_dict()
    assert not torch.equal(averaged["model.blocks.0.attn.features"], first)
    for name in ("features", "passes"):
        assert torch.equal(averaged[f"model.blocks.0.attn.{name}"], own[f"model.blocks.0.attn.{name}"])


def views_of(batch: Batch, change: Any) -> Batch:
    return batch._replace(images=change(batch.images), views=[change(view) for view in batch.views])


@pytest.mark.parametrize("method", ["dino", "esvit"])
def test_a_skipped_step_leaves_no_trace(toy: Toy, method: str) -> None:
    raw = mapping(toy, {**DINO, "method": method})
    raw["student"] = {"model": "test_resnet"}
    raw["data"] |= {"resolution": 32, "views": [{**VIEWS[0], "size": 32}, {**VIEWS[1], "size": 16}]}
    trainer = trainer_of(from_mapping(raw))
    batches = batches_of(trainer)
    take_steps(trainer, batches, 2)
    before = state_of(trainer)
    micro_batches = next(batches)
    bad = [views_of(micro_batches[0], lambda images: images * math.nan), *micro_batches[1:]]
    trainer.train_step(bad)
    assert trainer.nonfinite.skipped
    after = state_of(trainer)
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    trainer.train_step(micro_batches)
    moved = state_of(trainer)
    for part in ("views.center", "views.average.fc1.weight", "views.head.fc1.weight"):
        assert not torch.equal(moved[f"methods.{method}.{part}"], after[f"methods.{method}.{part}"])
    assert all(value.isfinite().all() for value in moved.values())


def test_micro_batches_make_one_centre(toy: Toy) -> None:
    """The same step in one part and in two."""
    centers = []
    for parts in (1, 2):
        train = {"gradient_accumulation": parts, "ema": None}
        trainer = trainer_of(recipe_of(toy, train=train, student={"drop_path": 0.0}))
        take_steps(trainer, batches_of(trainer), 2)
        centers.append(state_of(trainer)["methods.dino.views.center"])
        assert centers[-1].any()
    torch.testing.assert_close(*centers, rtol=1e-3, atol=1e-5)


def test_the_last_layer_points_where_it_did_in_the_first_epoch(toy: Toy) -> None:
    trainer = trainer_of(recipe_of(toy, {**DINO, "freeze_last_epochs": 1}, optim={"lr": 0.01}))
    last = trainer.task.methods["dino"].views.head.last
    first = nn.functional.normalize(last.weight.detach(), dim=1)
    batches = batches_of(trainer)
    take_steps(trainer, batches, trainer.steps_per_epoch)
    torch.testing.assert_close(nn.functional.normalize(last.weight, dim=1), first)
    take_steps(trainer, batches_of(trainer), 2)
    assert (nn.functional.normalize(last.weight, dim=1) - first).abs().max() > 1e-4


class Remembering(Method):
    """Keeps what it is given after a step."""

    seen: list[StepInputs]

    def forward(self, step: StepInputs) -> Tensor:
        return step.student[0].embedding.square().mean()  # type: ignore[union-attr]

    def after_step(self, step: StepInputs, skipped: Tensor) -> None:
        self.seen = [step]


class RememberingOptions(MethodOptions):
    needs = Needs(embedding=True)
    method: str = "remembering"


def test_features_are_freed_after_the_backward_pass(toy: Toy) -> None:
    """Those of dino all; those of a method that wants them after the step are without their graphs."""
    trainer = trainer_of(recipe_of(toy))
    batch = next(batches_of(trainer))[0]
    kept: list[weakref.ref[Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Features) -> None:
        kept.extend(weakref.ref(value) for value in (output.embedding, output.regions) if value is not None)

    handle = trainer.student.register_forward_hook(note)
    trainer.task(batch, StepIndex(0, 0), 0.0).total.backward()
    handle.remove()
    gc.collect()
    assert len(kept) == 4, "two sizes, and embedding and regions of each"
    assert all(reference() is None for reference in kept)
    method = Remembering(RememberingOptions(), Shapes())
    task = Task(
        trainer.student, {"remembering": method}, None, label_smoothing=0.0, weights=lambda _: {"remembering": 1.0}
    )
    task(batch, StepIndex(0, 0), 0.0)
    task.after_step(0, torch.tensor(False))
    (seen,) = method.seen
    tensors = [value for view in seen.student for value in (view.embedding, view.regions)]
    assert len(tensors) == 2 * 5
    assert all(value is not None and value.grad_fn is None and not value.requires_grad for value in tensors)


@pytest.mark.parametrize("same", [False, True])
def test_lines_tell_answers_that_are_the_same_for_all_images(toy: Toy, same: bool) -> None:
    """The centre makes them uniform."""
    trainer = trainer_of(recipe_of(toy, {**DINO, "center_momentum": 0.0}, optim={"lr": 1e-6}))
    for batches in itertools.islice(batches_of(trainer), 3):
        trainer.accumulator.restart()
        trainer.train_step([views_of(one, torch.zeros_like) if same else one for one in batches])
    line = trainer.accumulator.read(16)
    assert line["loss/dino"] == pytest.approx(line["dino/teacher_entropy"] + line["dino/kl"], abs=1e-5)
    assert (line["dino/teacher_entropy"] > 0.99 * math.log(16)) == same


def test_a_cnn_and_the_average_teach_in_one_run(toy: Toy) -> None:
    """Until the CNN has nothing to say any more: then it is not asked."""
    guide = {"method": "guide", "weight": {"start": 1.0, "end": 0.0, "until": 0.5}}
    teacher = toy.mapping()["teacher"] | {"ema": {}}
    trainer = trainer_of(recipe_of(toy, DINO, guide, teacher=teacher))
    batch = next(batches_of(trainer))[0]
    assert trainer.student.heads == ()
    losses = trainer.task(batch, StepIndex(0, 0), 0.0)
    assert list(losses.parts) == ["dino", "guide"]
    torch.testing.assert_close(losses.total, losses.parts["dino"] + losses.parts["guide"])
    losses.total.backward()
    assert all(value.grad is not None for value in trainer.task.parameters() if value.requires_grad)
    asked: list[int] = []
    assert trainer.source is not None
    ask = trainer.source.ask
    trainer.source.ask = lambda views, index: asked.append(len(views)) or ask(views, index)  # type: ignore[method-assign, func-returns-value]
    trainer.task(batch, StepIndex(0, 0), 0.2)
    assert asked == [1], "its view 0 alone"
    losses = trainer.task(batch, StepIndex(0, 0), 0.9)
    assert asked == [1]
    assert losses.parts["guide"].isnan()
    assert losses.total.item() == losses.parts["dino"].item()


# Runs with labels beside, which are evaluated and exported


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("self") / "run"
    go(recipe_of(toy, label_weight=0.5, train=SHORT), out, None)
    return out


def test_a_resumed_run_is_the_same_bit_for_bit(toy: Toy, undisturbed: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(toy, label_weight=0.5, train=SHORT), tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 5)
    go(recipe, out, None, resume="auto")
    for stem in ("model", "ema", "methods"):
        one, other = (checkpoint.read_tensors(path / "checkpoints" / "last", stem) for path in (undisturbed, out))
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert {"dino.views.center", "dino.views.average.fc1.weight"} <= one.keys()
    assert train_lines(undisturbed) == train_lines(out)
    line = train_lines(out)[-1]
    assert line["loss/dino"] == pytest.approx(line["dino/teacher_entropy"] + line["dino/kl"], abs=1e-5)


def test_the_average_is_exported_as_ema(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here as the better one on the selection split."""
    evaluate = Trainer.evaluate

    def prefer(trainer: Trainer, tracking: Any) -> None:
        evaluate(trainer, tracking)
        trainer.progress.best_step, trainer.progress.best_weights = trainer.progress.step, "ema"

    monkeypatch.setattr(Trainer, "evaluate", prefer)
    out = tmp_path / "run"
    go(recipe_of(toy, label_weight=0.5, train={"ema": None, "max_steps": 2}), out, None)
    averaged = checkpoint.read_tensors(out / "checkpoints" / "last", "ema")
    exported = load_export(out / "export")[0].state_dict()
    raw = checkpoint.read_tensors(out / "checkpoints" / "last", "model")
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_two_processes_have_one_average_and_one_centre(toy: Toy, tmp_path: Path) -> None:
    import yaml

    raw = mapping(toy, label_weight=0.5, student={"drop_path": 0.0})
    raw["train"] |= {"gradient_accumulation": 1, "max_steps": 8, "epochs": 9}
    raw["distill"][0]["freeze_last_epochs"] = 0
    (tmp_path / "self.yaml").write_text(yaml.safe_dump(raw))
    lines, ends = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = launch(["train", tmp_path / "self.yaml", "--out", "run"], cwd=folder, processes=processes)
        assert done.wait(200) == [0] * processes, done.output
        lines.append(train_lines(folder / "run"))
        last = folder / "run" / "checkpoints" / "last"
        ends.append({stem: checkpoint.read_tensors(last, stem) for stem in ("ema", "methods")})
    for key in ("loss", "loss/dino", "dino/teacher_entropy", "dino/kl"):
        assert [line[key] for line in lines[1]] == pytest.approx([line[key] for line in lines[0]], abs=2e-5), key
    for stem, tensors in ends[0].items():
        for name, value in tensors.items():
            torch.testing.assert_close(ends[1][stem][name], value, rtol=1e-3, atol=2e-4, msg=name)


# Recipes

PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"data.views": None}, "data.views: dino compares at least two global views of an image; it names none"),
    ({"data.views": [{**VIEWS[0], "count": 1}, VIEWS[1]]}, "data.views: dino compares .* it has 1"),
    ({"teacher": None}, r"distill.0: dino learns from the student's own moving average; set teacher.ema to \{\}"),
    ({"teacher": {"model": "cifar_resnet20"}}, "distill.0: dino learns from the student's own moving average"),
    ({"distill": [], "label_weight": 1.0}, "teacher.ema: no method of 'distill' learns from it"),
    (
        {"distill": [{"method": "hard"}], "student.distillation_token": False},
        "distill.0: hard learns from logits of a frozen teacher, and teacher.ema has none",
    ),
    ({"distill": [DINO, {"method": "guide"}]}, "distill.1: guide learns from feature maps of a frozen teacher"),
    ({"data.views": None, "data.augment": {"mixup": 0.8}}, "data.augment.mixup: dino compares views of one image"),
    ({"data.views": None, "data.augment": {"cutmix": 0.8}}, "data.augment.cutmix: dino compares views of one image"),
    ({"train.ema": 0.99}, "train.ema: teacher.ema is the moving average that is evaluated"),
    ({"teacher": [{"model": "a"}, {"ema": {}}]}, "teacher.1.ema: goes beside a single teacher"),
    ({"teacher": {"ema": {}, "cache": True}}, "teacher.cache: is of a frozen teacher"),
    ({"teacher": {"ema": {"momentum": 1.5}}}, "teacher.ema.momentum: should be less than or equal to 1"),
    ({"distill": [{**DINO, "method": "esvit"}], "teacher": None}, "distill.0: esvit learns from the student's own"),
    ({"student.distillation_token": True}, "student.distillation_token: without labels"),
]


@pytest.mark.parametrize(("changes", "message"), PROBLEMS)
def test_problems_are_found_in_the_recipe(toy: Toy, changes: dict[str, Any], message: str) -> None:
    raw = copy.deepcopy(mapping(toy))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = raw
        for part in path:
            section = section[part]
        section[last] = value
    with pytest.raises(InputError, match=message) as error:
        from_mapping(raw)
    others = 2 if "data.augment" in changes else 1
    assert f"{others} problem(s)" in str(error.value)


def test_a_student_without_regions_is_refused_by_esvit(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "region_width", None)
    with pytest.raises(InputError, match="distill: esvit compares regions, and this student has no"):
        trainer_of(recipe_of(toy, {**DINO, "method": "esvit"}))
