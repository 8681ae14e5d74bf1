"""`data.growth`: the student trains on smaller images at first; its teacher and all evaluation have those of
`data.resolution`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import distill.exports.folder
from distill import run
from distill.cli import main
from distill.data import Batch
from distill.errors import InputError, Interrupted
from distill.launching.determinism import set_deterministic
from distill.recipe import Recipe
from distill.teaching.source import Frozen
from distill.trainer import Trainer
from tests.conftest import Toy
from tests.students.helpers import KINDS
from tests.test_feature_guidance import ALL
from tests.test_pipeline_variants import exported_answers
from tests.test_recipe_problems import problems
from tests.test_resume import go, same_end
from tests.test_step_speed import batches_of, take_steps, toy_recipe, trainer_of

GROWTH = {"start": 4, "until": 0.5}
"""Of 18 steps on 8 x 8 pixels, steps 0 to 8 are on 4 x 4."""
AREAS = {"kind": "area", "max_area": [2, 2], "blocks": [0, 1]}
STANDARD = {"kind": "standard"}


def growing(toy: Toy, growth: dict[str, Any] | None = GROWTH, **changes: Any) -> Recipe:
    """The toy recipe with a grid of 4 x 4 patches at full size."""
    data, student = {"growth": growth} | changes.pop("data", {}), {"patch_size": 2} | changes.pop("student", {})
    return toy_recipe(toy, data=data, student=student, **changes)


def steps_from(trainer: Trainer, first: int, number: int) -> None:
    trainer.progress.step = first
    take_steps(trainer, batches_of(trainer), number)


def inputs_of(module: nn.Module) -> list[Tensor]:
    """What the module is given from now on."""
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    return found


def halved(images: Tensor) -> Tensor:
    """[B, C, 8, 8] -> [B, C, 4, 4] by a triangle of the width of two output pixels, cut off at the edges."""
    rows = torch.zeros(4, 8, dtype=torch.float64)
    for row in range(4):
        for column in range(8):
            rows[row, column] = max(0.0, 1 - abs(column - (2 * row + 0.5)) / 2)
    rows = rows / rows.sum(1, keepdim=True)
    return rows @ images.double() @ rows.T


@pytest.mark.parametrize("attention", [STANDARD, AREAS], ids=["standard", "areas"])
def test_the_student_sees_small_images_until_then_and_the_teacher_never(toy: Toy, attention: dict[str, Any]) -> None:
    trainer = trainer_of(growing(toy, student={"attention": attention}))
    trainer.dataset.set_views(2)
    assert isinstance(trainer.source, Frozen)
    seen, shown = inputs_of(trainer.student.model), inputs_of(trainer.source.teacher)
    batches: list[Batch] = []

    def noted(source: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        for micro_batches in source:
            batches.extend(micro_batches)
            yield micro_batches

    trainer.progress.step = 7
    take_steps(trainer, noted(batches_of(trainer)), 4)
    images = [view for batch in batches for view in (batch.images, *batch.views)]
    assert len(images) == len(seen) == len(shown) == 4 * 2 * 2  # steps, micro-batches, views
    adapter = trainer.student.adapter
    for index, (full, small, taught) in enumerate(zip(images, seen, shown, strict=True)):
        assert torch.equal(taught, full)
        expected = halved(full) if index < 2 * 2 * 2 else full.double()  # steps 7 and 8 of 18, then 9 and 10
        torch.testing.assert_close(small.double(), (expected - adapter.mean) / adapter.std, rtol=0, atol=1e-5)
    assert trainer.student.eval().logits(images[0])["cls"].shape == (8, 4)
    assert seen[-1].shape == (8, 3, 8, 8)


@pytest.mark.parametrize("attention", [STANDARD, AREAS, *KINDS.values()], ids=["standard", "areas", *KINDS])
def test_steps_at_full_size_are_those_without_growth(toy: Toy, attention: dict[str, Any]) -> None:
    found = []
    for growth in (None, GROWTH):
        trainer = trainer_of(growing(toy, growth, student={"attention": attention}))
        begun = trainer.initial_weights
        steps_from(trainer, 9, 2)
        found.append((begun, trainer.accumulator.read(16)["loss"], trainer.student.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())


def test_all_methods_take_a_step_on_the_small_grid(toy: Toy) -> None:
    trainer = trainer_of(growing(toy, distill=ALL, student={"stem": "conv"}))
    grids = []
    forward = trainer.student.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        features = forward(*args, **kwargs)
        grids.append({tuple(found.shape[2:]) for found in features.maps.values()})
        return features

    trainer.student.forward = noted  # type: ignore[method-assign]
    for step, side in ((8, 2), (9, 4)):
        grids.clear()
        steps_from(trainer, step, 1)
        values = trainer.accumulator.read(16)
        assert grids == [{(side, side)}] * 2
        assert trainer.nonfinite.read(10) == 0
        assert {name for name in values if name.startswith("loss/")} == {
            "loss/label", *(f"loss/{section['method']}" for section in ALL)
        }  # fmt: skip
        for parameter in trainer.task.methods.parameters():
            assert parameter in trainer.optimizer.state  # it had a gradient


@pytest.mark.parametrize("key_mode", ["mean", "sum"])
def test_areas_larger_than_the_small_grid_are_cut_to_it(toy: Toy, key_mode: str) -> None:
    found = []
    for area in ([4, 3], [2, 2]):
        attention = AREAS | {"max_area": area, "key_mode": key_mode}
        trainer = trainer_of(growing(toy, student={"attention": attention, "drop_path": 0.0}))
        steps_from(trainer, 0, 1)
        assert trainer.nonfinite.read(10) == 0
        found.append(trainer.accumulator.read(16)["loss"])
    if key_mode == "mean":  # without weights of each size of areas
        assert found[0] == found[1]


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without areas, so that timm alone loads the export."""
    out = tmp_path_factory.mktemp("growing") / "run"
    go(short(toy), out, None)
    return out


def short(toy: Toy, growth: dict[str, Any] = GROWTH) -> Recipe:
    report = {"analysis": "none"}
    return growing(toy, growth, student={"attention": STANDARD}, distill=[{"method": "guide"}], report=report)


def test_a_run_resumed_before_and_at_the_switch_ends_bit_for_bit_the_same(
    toy: Toy, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    out = tmp_path / "run"
    for steps in (7, 2):  # of this launch
        with pytest.raises(Interrupted):
            go(short(toy), out, steps, resume="auto" if out.exists() else None)
    with pytest.raises(InputError, match=r"data\.growth\.until: 0\.5 -> 0\.6"):
        go(short(toy, GROWTH | {"until": 0.6}), out, None, resume="auto")
    go(short(toy), out, None, resume="auto")
    same_end(undisturbed, out)


def test_the_export_is_timms_and_answers_as_the_run_did(toy: Toy, undisturbed: Path) -> None:
    config = json.loads((undisturbed / "export" / "config.json").read_text())
    assert config["architecture"] == "deit_tiny_distilled_patch16_224"
    assert "dynamic_img_size" not in config["model_args"]
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]
    logits = exported_answers(undisturbed, load_file(toy.root / "toy.safetensors")["test.images"].float() / 255)
    found = load_file(undisturbed / "predictions.safetensors")["student.fused"]
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    assert run.read_recipe(undisturbed).data.growth is not None


def test_a_dry_run_says_it(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["data.growth.start=4", "data.growth.until=0.25", "student.patch_size=2"]
    assert main(["train", str(toy.recipe), "--dry-run", *changes]) == 0
    line = "growth      the student trains on images of 4 x 4 pixels, from 25 % of the run on at full size"
    assert line in capsys.readouterr().out


# What cannot be

VIT = {"model": "vit_nano", "patch_size": 4}


@pytest.mark.parametrize(
    ("growth", "student", "key", "words"),
    [
        ({"start": 32}, VIT, "data.growth.start", "smaller than data.resolution 32, got 32"),
        ({"start": 48}, {"model": "resnet18"}, "data.growth.start", "smaller than data.resolution 32, got 48"),
        ({"start": 18}, VIT, "data.growth.start", "18 is not divisible by the patch size 4"),
        ({"start": 8}, VIT | {"patch_size": 16}, "data.growth.start", "8 is not divisible by the patch size 16"),
        ({"start": 16, "until": 0.0}, VIT, "data.growth.until", "greater than 0"),
        ({"start": 16, "until": 1.5}, VIT, "data.growth.until", "less than or equal to 1"),
    ],
)
def test_values_that_do_not_fit(growth: dict[str, Any], student: dict[str, Any], key: str, words: str) -> None:
    found = problems({"data": {"resolution": 32, "growth": growth}, "student": student})
    assert list(found) == [key]
    assert words in found[key]


def test_a_student_of_one_size_is_refused_by_name(toy: Toy) -> None:
    """The tokens of gMLP are mixed by matrices of their number."""
    changes = {"data": {"resolution": 32, "growth": {"start": 16}}, "distill": []}
    student = {"model": "gmlp_ti16_224", "attention": STANDARD, "patch_size": None, "drop_path": 0.0}
    with pytest.raises(InputError, match=r"^data\.growth\.start: gmlp_ti16_224 cannot take images of 16 px \("):
        trainer_of(toy_recipe(toy, student=student, **changes))


@pytest.mark.parametrize("model", ["test_vit", "cifar_resnet20"])
def test_timms_students_that_take_both_sizes(toy: Toy, model: str) -> None:
    changes = {"data": {"resolution": 32, "growth": {"start": 16}}, "distill": []}
    student = {"model": model, "attention": STANDARD, "patch_size": None, "drop_path": 0.0}
    trainer = trainer_of(toy_recipe(toy, student=student, **changes))
    seen = inputs_of(trainer.student.model)
    steps_from(trainer, 8, 2)
    assert [images.shape[-1] for images in seen] == [16, 16, 32, 32]
    assert trainer.nonfinite.read(10) == 0
    assert "dynamic_img_size" not in trainer.student.model_args


@pytest.mark.gpu
def test_gradients_that_are_not_deterministic_on_a_gpu_are_refused(toy: Toy) -> None:
    try:
        with pytest.raises(InputError, match=r"^train\.deterministic: on a GPU"):
            trainer_of(growing(toy, train={"deterministic": True}))
        trainer_of(growing(toy, None, train={"deterministic": True}))
    finally:
        set_deterministic(False)
