"""`base: other.yaml`: what a recipe inherits, what it changes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import InputError
from distill.recipe import Recipe, from_mapping, load
from distill.recipe.inheritance import with_bases
from distill.run import read_status
from tests.conftest import Toy
from tests.warm import launch

BASE: dict[str, Any] = {
    "seed": 3,
    "teacher": {"model": "cifar_resnet20", "min_accuracy": 0.9},
    "student": {
        "model": "vit_nano",
        "patch_size": 4,
        "attention": {"kind": "area", "max_area": 3, "blocks": [0, 1, 2]},
    },
    "distill": [{"method": "hard", "weight": 0.5}, {"method": "guide"}],
    "optim": {"lr": 2.0e-3, "clip_grad": 2.0},
    "train": {"epochs": 7, "batch_size": 64},
    "control": True,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "common" / "base.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(BASE))
    return path


def child(folder: Path, name: str = "child.yaml", *, base: Any = "common/base.yaml", **changes: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"base": base, **changes}))
    return path


def resolved(changes: dict[str, Any]) -> Recipe:
    """BASE with some sections replaced by hand, named as `child.yaml` is."""
    return from_mapping(BASE | changes, default_name="child")


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, {}),
        ({"seed": 1, "control": False}, {"seed": 1, "control": False}),
        ({"train": {"epochs": 2}}, {"train": {"epochs": 2, "batch_size": 64}}),
        ({"train": {}}, {}),
        ({"distill": [{"method": "soft"}]}, {"distill": [{"method": "soft"}]}),
        (
            {"student": {"attention": {"kind": "area", "blocks": [5]}}},
            {"student": BASE["student"] | {"attention": {"kind": "area", "max_area": 3, "blocks": [5]}}},
        ),
        (
            {"student": {"attention": {"max_area": [2, 2]}}},
            {"student": BASE["student"] | {"attention": {"kind": "area", "max_area": [2, 2], "blocks": [0, 1, 2]}}},
        ),
        (
            {"student": {"attention": {"kind": "standard"}}},
            {"student": {"model": "vit_nano", "patch_size": 4, "attention": {"kind": "standard"}}},
        ),
        ({"optim": {"clip_grad": None}}, {"optim": {"lr": 2.0e-3, "clip_grad": None}}),
        ({"teacher": None, "distill": [], "control": False}, {"teacher": None, "distill": [], "control": False}),
        ({"teacher": [{"model": "a"}], "distill": []}, {"teacher": [{"model": "a"}], "distill": []}),
        ({"data": {"augment": {"hflip": True}}}, {"data": {"augment": {"hflip": True}}}),
    ],
    ids=str,
)
def test_mappings_merge_and_all_else_is_replaced(
    tmp_path: Path, base: Path, changes: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    changes = {"control": False} | changes if changes.get("distill") == [] else changes
    by_hand = {"control": False} | by_hand if by_hand.get("distill") == [] else by_hand
    recipe = load(child(tmp_path, **changes))
    assert recipe == resolved(by_hand)
    assert recipe.digest() == resolved(by_hand).digest()
    assert "base" not in recipe.flat()
    assert "base" not in yaml.safe_load(recipe.to_yaml())


def test_a_teacher_from_another_source_replaces_that_of_the_base(tmp_path: Path, base: Path) -> None:
    source = {"teacher": {"source": "average", "decay": 0.9}}
    merged, bases = with_bases({"base": "common/base.yaml", **source}, tmp_path / "child.yaml", tmp_path)
    assert merged == BASE | source
    assert bases == [base]


def test_a_network_replaces_the_source_of_the_base(tmp_path: Path, base: Path) -> None:
    base.write_text(yaml.safe_dump({"teacher": {"source": "average", "decay": 0.9}}))
    network = {"teacher": {"source": None, "model": "cifar_resnet20"}}
    merged, _ = with_bases({"base": "common/base.yaml", **network}, tmp_path / "child.yaml", tmp_path)
    assert merged == {"teacher": {"model": "cifar_resnet20"}}


def test_a_null_base_and_a_base_alone(tmp_path: Path, base: Path) -> None:
    assert load(child(tmp_path, base=None, seed=4)) == from_mapping({"seed": 4}, default_name="child")
    assert load(child(tmp_path, "other.yaml")) == from_mapping(BASE, default_name="other")


def test_overrides_come_last(tmp_path: Path, base: Path) -> None:
    path = child(tmp_path, train={"epochs": 2})
    recipe = load(path, ["train.epochs=5", "student.attention={kind: area, max_area: 2}", "distill.1.weight=0.1"])
    assert (recipe.train.epochs, recipe.train.batch_size) == (5, 64)
    assert recipe.student.attention.model_dump()["blocks"] == [0, 1]  # the default: an override replaces a section
    assert recipe.distill[1].weight == 0.1


def test_each_base_is_relative_to_the_file_that_names_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = child(tmp_path, "here/middle.yaml", base="../common/base.yaml", train={"epochs": 2}, seed=4)
    top = child(tmp_path, "there/far/child.yaml", base="../../here/middle.yaml", seed=5)
    expected = resolved({"seed": 5, "train": {"epochs": 2, "batch_size": 64}})
    assert load(top) == expected
    monkeypatch.chdir(top.parent)
    assert load("child.yaml") == load(Path("../far/child.yaml")) == expected
    assert from_mapping({"base": str(middle), "seed": 5}, default_name="child") == expected
    assert from_mapping({"base": "child.yaml"}, default_name="child") == expected  # relative to the working directory


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: absent.yaml", "child.yaml: base: {}/absent.yaml: cannot read the recipe: no such file"),
        ("base: common", "child.yaml: base: {}/common: cannot read the recipe: "),
        ("base: common/list.yaml", "child.yaml: base: {}/common/list.yaml: a recipe is a mapping"),
        ("base: common/broken.yaml", "child.yaml: base: {}/common/broken.yaml: not valid YAML (line 2"),
        ("base: 3", "child.yaml: base: should be the path of a recipe, got 3"),
        ("base: [common/base.yaml]", "child.yaml: base: should be the path of a recipe, got ["),
        ("base: ''", "child.yaml: base: should be the path of a recipe, got ''"),
        ('base: "a\\eb"', "child.yaml: base: should be the path of a recipe, got 'a\\x1bb'"),
        pytest.param(f"base: {'a' * 2000}", "child.yaml: base: should be the path of a recipe, got 'aaa", id="long"),
        ("base: child.yaml", "child.yaml -> {}/child.yaml: base: a recipe cannot be its own base"),
        ("base: common/back.yaml", "a recipe cannot be its own base"),
        ("base: common/0.yaml", "common/10.yaml: base: more than 10 bases"),
        ("bsae: common/base.yaml", "bsae: unknown key; did you mean 'base'?"),
    ],
)
def test_bases_that_cannot_be_followed_are_refused_by_name(tmp_path: Path, base: Path, text: str, words: str) -> None:
    (base.parent / "list.yaml").write_text("[1]")
    (base.parent / "broken.yaml").write_text("train: [\n")
    (base.parent / "back.yaml").write_text("base: ../common/../child.yaml")
    for index in range(12):
        (base.parent / f"{index}.yaml").write_text(f"base: {index + 1}.yaml")
    path = tmp_path / "child.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert words.format(tmp_path) in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "problem" in str(caught.value) or len(str(caught.value).splitlines()) == 1


def test_ten_bases_in_a_row_are_followed(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index}.yaml").write_text(f"base: {index + 1}.yaml\noptim: {{lr: 0.{index + 1}}}")
    (tmp_path / "10.yaml").write_text("seed: 9")
    recipe = load(tmp_path / "0.yaml")
    assert (recipe.seed, recipe.optim.lr) == (9, 0.1)


def test_problems_name_the_bases_and_all_come_at_once(tmp_path: Path, base: Path) -> None:
    base.write_text(yaml.safe_dump(BASE | {"tarin": {"epochs": 1}, "train": {"epochs": "many"}}))
    path = child(tmp_path, optim={"lr": -1.0})
    with pytest.raises(InputError) as caught:
        load(path, ["seed=x"])
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path} (base: {base}): 4 problem(s) in the recipe:"
    assert {line.strip().partition(":")[0] for line in lines} == {"tarin", "train.epochs", "optim.lr", "seed"}


def test_a_base_is_no_override(tmp_path: Path, base: Path) -> None:
    for recipe in (child(tmp_path), base):
        with pytest.raises(InputError, match="base: cannot be overridden"):
            load(recipe, [f"base={base}"])


def test_validate_prints_the_whole_recipe_and_the_schema_has_the_key(tmp_path: Path, base: Path) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "distill.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    path = child(tmp_path, seed=1)
    assert yaml.safe_load(said("validate", str(path)))["train"]["epochs"] == 7
    key = json.loads(said("schema"))["properties"]["base"]
    assert "mappings are merged" in key["description"]


def test_a_run_resumes_when_its_base_has_gone(tmp_path: Path, toy: Toy) -> None:
    (tmp_path / "base.yaml").write_text(toy.recipe.read_text())
    (tmp_path / "child.yaml").write_text("base: base.yaml\ntrain: {max_steps: 2}\n")
    begun = launch(["train", "child.yaml", "--out", "run", "train.max_minutes=0.0001"], cwd=tmp_path)
    assert begun.wait() == [75], begun.output
    assert (tmp_path / "run" / "recipe.yaml").read_text() == (tmp_path / "child.yaml").read_text()
    (tmp_path / "base.yaml").unlink()
    for recipe in ("child.yaml", "run/recipe.yaml"):
        refused = launch(["train", recipe, "--resume", "run"], cwd=tmp_path)
        assert refused.wait() == [2]
        assert f"error: {recipe}: base: " in refused.output
        assert "resolved.yaml" in refused.output
    resumed = launch(["train", "run/resolved.yaml", "train.max_minutes=null", "--resume", "run"], cwd=tmp_path)
    assert resumed.wait() == [0], resumed.output
    assert read_status(tmp_path / "run")["step"] == 2
