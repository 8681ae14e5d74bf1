"""Runs with `data.views`: what student and teacher see, processes, resuming, and what does not fit in a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distill.exports.folder
from distill import registry, run
from distill.cli import main
from distill.data import Batch
from distill.errors import InputError, Interrupted
from distill.teaching.source import Frozen
from distill.trainer import Trainer
from tests import warm
from tests.conftest import Toy
from tests.students.helpers import KINDS
from tests.test_growth import inputs_of
from tests.test_recipe_problems import problems
from tests.test_resume import go, same_end
from tests.test_step_speed import batches_of, take_steps, toy_recipe, trainer_of

PLUGIN = Path(__file__).parent / "plugins" / "all_views.py"
VIEWS: list[dict[str, Any]] = [
    {"kind": "global", "size": 8},
    {"kind": "global", "size": 8, "blur": 0.1, "solarize": 0.2},
    {"kind": "local", "count": 3, "size": 4},
]
AREAS = {"kind": "area", "max_area": [2, 2], "blocks": [0, 1]}


@pytest.fixture
def plugin() -> Iterator[None]:
    """In this process, for one test."""
    registry.load_plugin(str(PLUGIN))
    yield
    del registry._registered["methods", "all_views"], registry._files[str(PLUGIN)], registry._plugins[str(PLUGIN)]


def mapping(toy: Toy, **changes: Any) -> dict[str, Any]:
    """The toy recipe with these views and a grid of 4 x 4 patches."""
    data = {"views": VIEWS, "augment": {}} | changes.pop("data", {})
    student = {"patch_size": 2, "attention": AREAS, "drop_path": 0.0} | changes.pop("student", {})
    methods = [{"method": "hard"}, {"method": "all_views"}]
    return toy.mapping(data=data, student=student, **({"distill": methods} | changes))


def trainer_with(toy: Toy, **changes: Any) -> Trainer:
    return trainer_of(toy_recipe(toy, **mapping(toy, **changes)))


def one_step(trainer: Trainer) -> list[Batch]:
    """Take a step; its micro-batches."""
    batches = next(batches_of(trainer))
    take_steps(trainer, iter([batches]), 1)
    assert trainer.nonfinite.read(10) == 0
    return batches


@pytest.mark.usefixtures("plugin")
def test_a_size_is_one_pass_of_the_student_and_the_teacher_sees_the_first_view(toy: Toy) -> None:
    trainer = trainer_with(toy)
    assert isinstance(trainer.source, Frozen)
    seen, shown = inputs_of(trainer.student.model), inputs_of(trainer.source.teacher)
    batches = one_step(trainer)
    assert len(batches) == len(shown) == 2
    adapter = trainer.student.adapter
    for batch, taught, (large, small) in zip(batches, shown, (seen[:2], seen[2:]), strict=True):
        assert torch.equal(taught, batch.images)
        for inputs, views in ((large, (batch.images, batch.views[0])), (small, batch.views[1:])):
            assert torch.equal(inputs, (torch.cat(views) - adapter.mean) / adapter.std)


@pytest.mark.usefixtures("plugin")
def test_the_loss_is_that_of_one_view_after_the_other(toy: Toy) -> None:
    trainer = trainer_with(toy)
    batch = next(batches_of(trainer))[0]
    views = (batch.images, *batch.views)
    with torch.no_grad():
        found = trainer.task._ask_student(views, 1, None)
        alone = [trainer.student(view, side=view.shape[-1]) for view in views]
    for one, other in zip(found, alone, strict=True):
        for head, logits in other.logits.items():
            torch.testing.assert_close(one.logits[head], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("plugin")
def test_feature_maps_are_those_of_the_views_that_the_teacher_sees(toy: Toy) -> None:
    trainer = trainer_with(toy, distill=[{"method": "guide"}, {"method": "all_views"}])
    asked = []
    forward = trainer.student.forward

    def noted(images: torch.Tensor, want: tuple[int, ...] = (), **options: Any) -> Any:
        asked.append((images.shape[-1], bool(want)))
        return forward(images, want, **options)

    trainer.student.forward = noted  # type: ignore[method-assign]
    one_step(trainer)
    assert asked == [(8, True), (4, False)] * 2


STUDENTS: dict[str, dict[str, Any]] = {
    **{name: {"attention": kind} for name, kind in KINDS.items()},
    "standard, conv stem": {"attention": {"kind": "standard"}, "stem": "conv"},
    "areas of a sequence": {"attention": {"kind": "area", "max_area": 3, "blocks": "all"}},
    **{
        name: {"model": name, "patch_size": None, "attention": {"kind": "standard"}}
        for name in ("focal_nano", "regionvit_nano", "lg_nano")
    },
}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_all_kinds_take_a_step(toy: Toy, name: str) -> None:
    views = [VIEWS[0] | {"size": 16, "count": 2}, VIEWS[2] | {"size": 8}]
    student = STUDENTS[name] | ({"patch_size": 4} if name == "areas of a sequence" else {})
    trainer = trainer_with(toy, data={"resolution": 16, "views": views}, student=student)
    before = {key: value.clone() for key, value in trainer.student.named_parameters()}
    one_step(trainer)
    assert any(not torch.equal(value, before[key]) for key, value in trainer.student.named_parameters())
    if name == "performer":
        passes = {int(value) for key, value in trainer.student.named_buffers() if key.endswith("attn.passes")}
        assert passes == {4}, "two micro-batches of two sizes"


def test_a_run_without_a_method_on_all_views_has_the_first_one_alone(toy: Toy) -> None:
    recipe = toy_recipe(toy, **mapping(toy, distill=[{"method": "hard"}]))
    for one in (recipe, recipe.as_control()):
        trainer = trainer_of(one)
        seen = inputs_of(trainer.student.model)
        batches = one_step(trainer)
        assert [images.shape[-1] for images in seen] == [8, 8]
        assert not any(batch.views for batch in batches)


@pytest.mark.usefixtures("plugin")
def test_views_that_are_not_there(toy: Toy) -> None:
    with pytest.raises(InputError, match=r"^data\.views: a method compares several views"):
        trainer_with(toy, data={"views": None})
    with pytest.raises(InputError, match=r"^data\.views: a method needs 2 views of each image, got 1\."):
        trainer_with(toy, data={"views": VIEWS[:1]}).dataset.set_views(2)
    student = {"model": "gmlp_ti16_224", "patch_size": None, "attention": {"kind": "standard"}}
    views = [VIEWS[0] | {"size": 32}, VIEWS[2] | {"size": 16}]
    with pytest.raises(InputError, match=r"^data\.views\.1\.size: gmlp_ti16_224 cannot take images of 16 px"):
        trainer_with(toy, data={"resolution": 32, "views": views}, student=student)


def test_a_dry_run_names_the_views(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"data.views={json.dumps(VIEWS)}", "data.augment={}", "student.patch_size=2"]
    assert main(["train", str(toy.recipe), "--dry-run", *changes]) == 0
    line = "views       1 of 8 x 8 pixels (global), 1 of 8 x 8 pixels (global), 3 of 4 x 4 pixels (local)"
    assert line in capsys.readouterr().out


# Whole runs


@pytest.mark.usefixtures("plugin")
def test_a_stop_and_two_processes_change_nothing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *_: None)
    raw = mapping(toy, train={"threads": 1})
    recipe = toy_recipe(toy, **raw)
    whole, parts, two = (tmp_path / name for name in ("whole", "parts", "two"))
    go(recipe, whole, None)
    with pytest.raises(Interrupted):
        go(recipe, parts, 7)
    changed = mapping(toy, data={"views": [*VIEWS[:2], VIEWS[2] | {"size": 2}]})
    with pytest.raises(InputError, match=r"data\.views\.2\.size: 4 -> 2"):
        go(toy_recipe(toy, **changed), parts, None, resume="auto")
    go(recipe, parts, None, resume="auto")
    same_end(whole, parts)

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    short = ("train.gradient_accumulation=1", "train.max_steps=4")
    command = ["train", "recipe.yaml", "--plugin", PLUGIN, "--out", two, *short]
    launched = warm.launch(command, cwd=tmp_path, processes=2)
    assert launched.wait() == [0, 0], launched.output
    losses = [[line["loss"] for line in run.read_metrics(folder, "train")] for folder in (whole, two)]
    assert losses[1] == pytest.approx(losses[0][:4], abs=1e-5)


# What does not fit

SECOND = {"kind": "local", "size": 16}


@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        ({"views": []}, "data.views", "at least 1 item"),
        ({"views": [{"kind": "local", "size": 32}]}, "data.views", "at least one global group"),
        ({"views": [SECOND, {"kind": "global", "size": 32}]}, "data.views", "all before the local ones"),
        ({"views": [{"kind": "middle", "size": 32}]}, "data.views.0.kind", "'global' or 'local'"),
        ({"views": [{"kind": "global", "size": 16}]}, "data.views.0.size", "has data.resolution 32, got 16"),
        ({"views": [{}], "resolution": 64}, "data.views.0.size", "has data.resolution 64, got 32"),
        ({"views": [{"scale": [0.9, 0.5]}]}, "data.views.0.scale", "smallest, then largest"),
        ({"views": [{"scale": [0.0, 0.5]}]}, "data.views.0.scale", "both above 0"),
        ({"views": [{"ratio": [1.5, 0.5]}]}, "data.views.0.ratio", "smallest, then largest"),
        ({"views": [{"blur_sigma": [2.0, 0.1]}]}, "data.views.0.blur_sigma", "smallest, then largest"),
        ({"views": [{"blur": 1.5}]}, "data.views.0.blur", "less than or equal to 1"),
        ({"views": [{"count": 0}]}, "data.views.0.count", "greater than or equal to 1"),
        ({"views": [{}, SECOND | {"size": 40}]}, "data.views.1.size", "at most data.resolution 32, got 40"),
        ({"views": [{}, SECOND | {"size": 18}]}, "data.views.1.size", "18 is not divisible by the patch size 4"),
        ({"views": [{"blurr": 0.5}]}, "data.views.0.blurr", "did you mean 'blur'?"),
        ({"views": [{}], "augment": {"hflip": True}}, "data.augment", "has its own augmentation"),
        ({"views": [{}], "growth": {"start": 16}}, "data.growth", "data.views has sizes of its own"),
    ],
    ids=str,
)
def test_values_that_do_not_fit(data: dict[str, Any], key: str, words: str) -> None:
    first = {"kind": "global", "size": 32}
    views = [group if "kind" in group else first | group for group in data["views"]]
    found = problems({"data": data | {"views": views}, "student": {"model": "vit_nano", "patch_size": 4}})
    assert list(found) == [key]
    assert words in found[key]


def test_pyramids_name_the_view_that_does_not_fit() -> None:
    views = [{"kind": "global", "size": 32}, {"kind": "local", "size": 12}]
    found = problems({"data": {"views": views}, "student": {"model": "regionvit_nano"}})
    assert list(found) == ["data.views.1.size"]
    assert "12 is not divisible by the regions of 4x4 patches of 2 px" in found["data.views.1.size"]


def test_local_views_have_defaults_of_their_own(toy: Toy) -> None:
    recipe = toy_recipe(toy, **mapping(toy, distill=[{"method": "hard"}]))
    assert recipe.data.views is not None
    assert [(group.scale, group.blur) for group in recipe.data.views] == [
        ([0.4, 1.0], 1.0), ([0.4, 1.0], 0.1), ([0.05, 0.4], 0.5)
    ]  # fmt: skip
    assert toy_recipe(toy, **yaml.safe_load(recipe.to_yaml())) == recipe
