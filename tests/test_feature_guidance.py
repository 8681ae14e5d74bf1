"""Whole runs that learn from feature maps: what is kept, what is measured, what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import distill.data.rows
import distill.exports.folder
from distill import checkpoint, run
from distill.data import Batch
from distill.errors import InputError, Interrupted
from distill.features import Features
from distill.options import MethodOptions
from distill.recipe import Recipe, from_mapping
from distill.teaching.source import Frozen, StepIndex
from distill.trainer import Trainer
from distill.training.optim import build_optimizer
from distill.training.task import build_task
from teachers.cifar_resnet import CifarResNet
from tests.conftest import Toy
from tests.test_pipeline_variants import exported_answers
from tests.test_resume import go, same_end, train_lines
from tests.test_step_speed import Calls, Operators, batches_of, take_steps, tracking_of, trainer_of

GUIDE = {"method": "guide", "weight": {"start": 2.5, "end": 0.0, "until": 0.7}}
HINTS = {"method": "fitnet", "projection": "orthogonal", "weight": 1e-3}
GUIDED: list[dict[str, Any]] = [{"method": "hard", "weight": 0.25}, GUIDE, HINTS]
ALL: list[dict[str, Any]] = [
    {"method": "hard"}, {"method": "soft", "standardize": True, "weight": 9.0}, {"method": "dkd"}, {"method": "dist"},
    GUIDE, HINTS, {"method": "attention_transfer"}, {"method": "relational"},
    {"method": "similarity", "weight": 3.0}, {"method": "contrast"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_export.py is where it is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


def recipe_of(toy: Toy, **changes: Any) -> Recipe:
    return from_mapping(toy.mapping(**{"distill": GUIDED, **changes}), default_name="toy")


def directory_at(path: Path) -> run.Run:
    directory = run.Run(path, is_main=True)
    directory.checkpoints.mkdir(parents=True)
    return directory


def owned_by(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.task.methods.state_dict().items()}


# What is kept: in checkpoints all, in exports and averages the student alone


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs with accumulation, averaging, drop path and mixing, and shares in each line."""
    out = tmp_path_factory.mktemp("guided") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
        go(recipe_of(toy, train={"log_gradient_share": True}), out, None)
    assert run.read_status(out)["state"] == "finished"
    return out


PROJECTIONS = {
    *(f"guide.guidance.{index}.projection.{part}" for index in range(3) for part in ("weight", "bias")),
    "fitnet.hints.0.regressor.skew",
}


def test_projections_are_in_checkpoints_and_learn(toy: Toy, undisturbed: Path) -> None:
    folders = checkpoint.existing(undisturbed / "checkpoints")
    states = [checkpoint.read_tensors(folder, "methods") for folder in folders]
    assert len(states) >= 3
    begun = owned_by(trainer_of(recipe_of(toy)))
    for state, before in zip(states, [begun, *states], strict=False):
        assert state.keys() == before.keys() == PROJECTIONS
        assert all((value != before[name]).any() for name, value in state.items())
    student = checkpoint.read_tensors(folders[-1], "model")
    assert checkpoint.read_tensors(folders[-1], "ema").keys() == student.keys()
    assert not any(part in name for part in ("guide", "fitnet", "projection", "regressor") for name in student)
    moments = checkpoint.read_optimizer(folders[-1])["state"]
    assert len(moments) == len([*trainer_of(recipe_of(toy)).student.parameters()]) + len(states[0])


def test_the_export_is_the_student_alone(toy: Toy, undisturbed: Path) -> None:
    weights = load_file(undisturbed / "export" / "model.safetensors")
    model = timm.create_model(f"local-dir:{undisturbed / 'export'}", pretrained=True).eval()
    assert {f"model.{name}" for name in weights} == {
        name for name in trainer_of(recipe_of(toy)).student.state_dict() if name.startswith("model.")
    }
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    logits = exported_answers(undisturbed, load_file(toy.root / "toy.safetensors")["test.images"].float() / 255)
    found = load_file(undisturbed / "predictions.safetensors")["student.fused"]
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_without_owners_there_is_no_such_file(toy: Toy, tmp_path: Path) -> None:
    trainer = trainer_of(recipe_of(toy, distill=[{"method": "hard"}, {"method": "similarity"}]))
    trainer.save(directory_at(tmp_path / "run"))
    trainer.finish_saving()
    assert not list((tmp_path / "run").rglob("methods*"))
    assert list((tmp_path / "run").rglob("ema.safetensors"))


@pytest.mark.parametrize("stops", [(5, 7)], ids=str)
def test_a_stopped_run_resumes_bit_for_bit(toy: Toy, undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    out, recipe = tmp_path / "run", recipe_of(toy, train={"log_gradient_share": True})
    for index, steps in enumerate(stops):
        with pytest.raises(Interrupted):
            go(recipe, out, steps, resume="auto" if index else None)
    go(recipe, out, None, resume="auto")
    same_end(undisturbed, out)
    ends = [checkpoint.read_tensors(path / "checkpoints" / "last", "methods") for path in (undisturbed, out)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_damaged_projection_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed / "checkpoints" / "last", tmp_path / "step")
    file = folder / "methods.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"methods\.safetensors"):
        checkpoint.verify(folder)


# What is measured


def test_the_parts_recombine_to_the_loss(undisturbed: Path) -> None:
    lines = train_lines(undisturbed)
    assert len(lines) == 18
    for index, line in enumerate(lines):
        assert line["weight/guide"] == pytest.approx(2.5 * max(0.0, 1 - index / 18 / 0.7))
        assert {key for key in line if key.startswith("weight/")} == {"weight/guide"}, "the others do not change"
        assert ("loss/guide" in line) == (index / 18 < 0.7), "then it has ended"
        guide = line["weight/guide"] * line.get("loss/guide", 0.0)
        weighted = 0.5 * line["loss/label"] + 0.25 * line["loss/hard"] + 1e-3 * line["loss/fitnet"]
        assert line["loss"] == pytest.approx(weighted + guide, rel=1e-5)
    assert lines[-1]["weight/guide"] == 0.0
    assert lines[8]["loss/guide"] < lines[0]["loss/guide"]


def test_shares_are_logged_and_sum_to_one(undisturbed: Path) -> None:
    for line in train_lines(undisturbed):
        shares = {key: value for key, value in line.items() if key.startswith("gradient_share/")}
        teaching = ["guide"] if "loss/guide" in line else []
        assert shares.keys() == {f"gradient_share/{name}" for name in ("label", "hard", *teaching, "fitnet")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert all(0 <= share <= 1 for share in shares.values())
        assert ("gradient_share/guide" in shares) == (line["weight/guide"] > 0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": {"gradient_checkpointing": True}}, {"train": {"precision": "bf16"}}],
    ids=["plain", "checkpointing", "bf16"],
)
def test_shares_are_those_by_hand_and_change_nothing(toy: Toy, changes: dict[str, Any]) -> None:
    trainers = {}
    for share in (False, True):
        train = {**changes.get("train", {}), "log_gradient_share": share, "log_every": 2}
        trainers[share] = trainer_of(recipe_of(toy, distill=ALL, train=train))
    trainer = trainers[True]
    take_steps(trainers[False], batches_of(trainers[False]), 4)
    batches = batches_of(trainer)
    take_steps(trainer, batches, 1)
    assert trainer.gradient_shares.latest == {}, "only at the steps that are logged"
    take_steps(trainer, batches, 1)
    found = {name: share.item() for name, share in trainer.gradient_shares.latest.items()}
    take_steps(trainer, batches, 2)
    states = [each.task.state_dict() for each in trainers.values()]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert len(found) == len(ALL) + 1

    # By hand: at the second step, of the first micro-batch, with a backward pass for each part of its own.
    again = trainer_of(recipe_of(toy, distill=ALL, train=changes.get("train", {})))
    batches = batches_of(again)
    take_steps(again, batches, 1)
    batch: Batch = next(batches)[0]
    weights = again.recipe.loss_weights(1 / again.schedule_steps)
    lengths = {}
    for name in found:
        torch.manual_seed(distill.trainer._seed_of(again.recipe.seed, 1, 0, 0))
        parts = again.model(batch, StepIndex(1, 0), 1 / again.schedule_steps).parts
        again.optimizer.zero_grad()
        (weights[name] * parts[name]).backward()
        squares = [p.grad.double().square().sum() for p in again.student.parameters() if p.grad is not None]
        lengths[name] = math.sqrt(sum(squares))
    total = sum(lengths.values())
    assert found == pytest.approx({name: length / total for name, length in lengths.items()}, rel=1e-3, abs=1e-7)
    assert min(length for name, length in lengths.items() if name != "dkd") > 0


def test_no_share_where_there_is_no_gradient(toy: Toy, tmp_path: Path) -> None:
    """At the first step nothing has a weight: the line stays one of numbers."""
    distill = [{"method": "dkd", "weight": {"start": 0.0, "end": 1.0}}]
    changes = {"student": {"distillation_token": False}, "train": {"log_gradient_share": True}}
    trainer = trainer_of(recipe_of(toy, distill=distill, label_weight=0.0, **changes))
    directory, batches = directory_at(tmp_path / "run"), batches_of(trainer)
    for _ in range(2):
        take_steps(trainer, batches, 1)
        trainer.log(tracking_of(trainer, directory))
    directory.metrics_size()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    first, second = train_lines(tmp_path / "run")
    assert "gradient_share/dkd" not in first
    assert (second["gradient_share/dkd"], second["gradient_share/label"]) == (1.0, 0.0)


def test_without_labels_maps_are_learned_by_a_student_without_a_head(toy: Toy) -> None:
    """Every parameter has a gradient, as DistributedDataParallel requires: the last maps are before the final norm."""
    guide = {"method": "guide", "weight": 1.0}
    trainer = trainer_of(recipe_of(toy, distill=[guide], label_weight=0.0, student={}))
    losses = trainer.task(next(batches_of(trainer))[0], StepIndex(0, 0), 0.0)
    losses.total.backward()
    assert trainer.student.heads == ()
    assert list(losses.parts) == ["guide"]
    assert losses.total.item() == losses.parts["guide"].item()
    assert all(parameter.grad is not None for parameter in trainer.task.parameters())


@pytest.mark.parametrize("token", [True, False])
def test_a_head_that_nothing_teaches_is_refused(toy: Toy, token: bool) -> None:
    hints, never = {"method": "fitnet", "weight": 1.0}, {"method": "hard", "weight": 0.0}

    def build(weight: float, *distill: dict[str, Any]) -> None:
        student = {"distillation_token": token}
        trainer_of(recipe_of(toy, distill=list(distill), label_weight=weight, student=student))

    build(0.5, hints)
    with pytest.raises(InputError, match="nothing would train the prediction"):
        build(0.0, hints, never)
    taught = {"method": "soft", "weight": {"start": 0.0, "end": 1.0}}
    if token:
        with pytest.raises(InputError, match="label_weight: 0: the class head would not be trained"):
            build(0.0, hints, taught)
    else:
        build(0.0, hints, taught)


# All methods together


@pytest.mark.parametrize("two_heads", [True, False])
def test_all_methods_together(toy: Toy, tmp_path: Path, two_heads: bool) -> None:
    recipe = recipe_of(toy, distill=ALL, student={"distillation_token": two_heads}, train={"max_steps": 2})
    assert recipe.data.augment.mixup
    assert recipe.data.augment.cutmix
    out = tmp_path / "run"
    go(recipe, out, None)
    assert run.read_status(out)["state"] == "finished"
    weights = {"hard": 0.5, "soft": 9.0, "dist": 1.0, "fitnet": 1e-3, "attention_transfer": 1000.0, "relational": 1.0}
    for line in train_lines(out):
        courses = {name: line[f"weight/{name}"] for name in ("guide", "dkd", "contrast")}
        weighted = {"label": 0.5, "similarity": 3.0, **weights, **courses}
        assert {f"loss/{name}" for name in weighted} == {key for key in line if key.startswith("loss/")}
        total = sum(weight * line[f"loss/{name}"] for name, weight in weighted.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    predicted = load_file(out / "predictions.safetensors")
    assert ("student.dist" in predicted) == two_heads


# Beside a control


def test_student_and_control_differ_in_the_teacher_alone(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(recipe_of(toy, control=True, data={"validation": 64}, train={"max_steps": 5}), out, None)
    assert run.read_status(out)["state"] == "finished"
    places = (out, out / "control")
    starts = [next(run.read_metrics(place, "start")) for place in places]
    assert starts[0]["initial_weights"] == starts[1]["initial_weights"]
    batches = [[line["batch"] for line in run.read_metrics(place, "epoch")] for place in places]
    assert len(batches[0]) == 2
    assert batches[0] == batches[1]
    for line in train_lines(out / "control"):
        assert line["loss"] == pytest.approx(0.75 * line["loss/label"], rel=1e-5)
    assert not list((out / "control").rglob("methods*"))
    plain = trainer_of(recipe_of(toy, distill=[{"method": "hard"}]))
    assert trainer_of(recipe_of(toy)).initial_weights == plain.initial_weights, "the projections draw nothing away"


def test_projections_depend_on_the_seed(toy: Toy) -> None:
    one, same, other = (owned_by(trainer_of(recipe_of(toy, seed=seed))) for seed in (3, 3, 4))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert all(not torch.equal(value, other[name]) for name, value in one.items())
    assert one.keys() == PROJECTIONS
    trainer, state = trainer_of(recipe_of(toy)), torch.get_rng_state()
    build_task(trainer.recipe, trainer.student, trainer.source, num_classes=4)
    assert torch.equal(torch.get_rng_state(), state), "the random state is left as it was"


def test_guide_alone_lets_both_heads_learn_the_labels(toy: Toy) -> None:
    recipe = recipe_of(toy, distill=[GUIDE])
    assert recipe.label_weight == 1.0
    trainer = trainer_of(recipe)
    model: Any = trainer.student.model
    before = {name: getattr(model, name).weight.detach().clone() for name in ("head", "head_dist")}
    take_steps(trainer, batches_of(trainer), 2)
    for name, weight in before.items():
        assert not torch.equal(getattr(model, name).weight, weight), name


# The optimizer


@pytest.mark.parametrize("layer_decay", [None, 0.8])
@pytest.mark.parametrize("name", ["adamw", "nmuon"])
def test_each_trained_parameter_is_in_one_group(toy: Toy, name: str, layer_decay: float | None) -> None:
    trainer = trainer_of(recipe_of(toy, optim={"name": name, "layer_decay": layer_decay, "weight_decay": 0.03}))
    optimizer = build_optimizer(trainer.recipe.optim, trainer.student.model, trainer.task.methods)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    names = {id(p): name for name, p in trainer.task.named_parameters() if p.requires_grad}
    assert {id(parameter) for parameter in grouped} == names.keys()
    owned = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)].startswith("methods."):
                owned += 1
                assert group["weight_decay"] == (0.03 if parameter.ndim > 1 else 0.0)
                assert group.get("lr_scale", 1.0) == 1.0
    assert owned == 7
    take_steps(trainer, batches_of(trainer), 2)
    for parameter in trainer.task.methods.parameters():
        assert trainer.optimizer.state[parameter], "it has been stepped"
        assert not trainer.optimizer.state[parameter].get("use_muon", False)
    rates = {group["lr"] / group.get("lr_scale", 1.0) for group in trainer.optimizer.param_groups}
    assert len({round(rate, 12) for rate in rates}) == 1, "all on one schedule"


# The teacher


def test_maps_are_asked_for_by_those_who_compare_them_only(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = CifarResNet.forward_intermediates

    def counting(network: CifarResNet, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("indices"))
        return original(network, *args, **kwargs)

    monkeypatch.setattr(CifarResNet, "forward_intermediates", counting)
    plain = trainer_of(recipe_of(toy, distill=[{"method": "hard"}]))
    take_steps(plain, batches_of(plain), 1)
    assert asked == []
    guided = trainer_of(recipe_of(toy, distill=[{"method": "hard"}, {"method": "similarity"}]))
    asked.clear()
    take_steps(guided, batches_of(guided), 1)
    assert asked == [[2], [2]], "the last of three maps, once a micro-batch"


def test_what_is_refused_before_anything_is_done(toy: Toy, tmp_path: Path) -> None:
    teacher = toy.mapping()["teacher"]
    for changes, message in (
        (
            {"teacher": {"cache": True}},
            "teacher.cache: guide learns from feature maps of the teacher, and only ",
        ),
        ({"teacher": [teacher, teacher]}, "distill.1: guide learns from feature maps of the teacher, and an ensemble "),
        ({"distill": [{"method": "guide", "pairs": [{"block": 6}]}]}, "distill.0.pairs: vit_nano has blocks 0 to 5"),
    ):
        with pytest.raises(InputError) as refused:
            recipe_of(toy, **changes)
        assert message in str(refused.value)
    recipe = recipe_of(toy, distill=[{"method": "guide", "pairs": [{"block": 1, "map": "layer9"}]}])
    with pytest.raises(InputError, match="no feature map 'layer9'; it has layer1, layer2, layer3"):
        go(recipe, tmp_path / "run", None)
    student = {"model": "cifar_resnet20", "patch_size": None, "attention": {"kind": "standard"}, "drop_path": 0.0}
    pairs = [{"block": 3, "map": "layer1"}]
    recipe = recipe_of(toy, distill=[{"method": "guide", "pairs": pairs}], student=student)
    with pytest.raises(InputError, match=r"the student has blocks 0 to 2, got \[3\]"):
        go(recipe, tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_a_cnn_learns_from_maps_too(toy: Toy) -> None:
    student = {"model": "cifar_resnet20", "patch_size": None, "attention": {"kind": "standard"}, "drop_path": 0.0}
    trainer = trainer_of(recipe_of(toy, distill=ALL, student=student))
    take_steps(trainer, batches_of(trainer), 2)
    assert math.isfinite(trainer.accumulator.read(16)["loss/guide"])
    guide: Any = trainer.task.methods["guide"]
    assert guide.pairs == [(0, "layer1"), (1, "layer2"), (2, "layer3")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_between_two_log_lines_waits_for_the_device(
    toy: Toy, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do maps, standardisation and resizing."""
    monkeypatch.setattr(distill.data.rows, "picks_rows", lambda device: False)
    trainer = trainer_of(recipe_of(toy, distill=ALL, train={"precision": precision}))
    batches = batches_of(trainer)
    take_steps(trainer, batches, 2)
    found: list[str] = []
    with Calls(found), Operators(found):
        take_steps(trainer, batches, 2)
    assert found == []


def test_before_its_teacher_is_trained_a_student_is_built_without_maps(toy: Toy) -> None:
    trainer = trainer_of(recipe_of(toy))
    without = build_task(trainer.recipe, trainer.student, None, num_classes=4)
    assert (without.blocks, dict(without.methods), without.methods.state_dict()) == ((), {}, {})


def test_methods_that_have_ended_cost_nothing_and_change_nothing(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From half of the run on the teacher is not asked; the student is as if the methods went on with weight 0."""
    ending = {"start": 1.0, "end": 0.0, "until": 0.5}
    recipe = recipe_of(toy, distill=[{"method": "guide", "weight": ending}, {"method": "fitnet", "weight": ending}])
    asked: list[int] = []
    ask = Frozen.ask

    def counting(source: Frozen, views: Any, index: StepIndex) -> list[Features]:
        asked.append(index.step)
        return ask(source, views, index)

    monkeypatch.setattr(Frozen, "ask", counting)
    go(recipe, tmp_path / "ended", None)
    assert set(asked) == set(range(9)), "of 18 steps"
    lines = list(run.read_metrics(tmp_path / "ended", "train"))
    for part in ("loss/guide", "loss/fitnet"):
        assert [line["step"] for line in lines if part in line] == list(range(1, 10))
    assert all(line["weight/guide"] == 0.0 for line in lines[9:])
    monkeypatch.setattr(MethodOptions, "has_ended", lambda *_: False)
    go(recipe, tmp_path / "weightless", None)
    for name in ("export/model.safetensors", "checkpoints/last/methods.safetensors"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "weightless" / name).read_bytes()
