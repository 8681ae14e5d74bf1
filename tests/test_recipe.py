"""The recipe: defaults, overrides, round trip, the recipes shipped, the schema, and that none of it needs torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.recipe import OPERATIONAL_KEYS, VIT_SIZES, from_mapping, load, recipe_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)

DISTILLED: dict[str, Any] = {
    "teacher": {"model": "cifar_resnet20"},
    "distill": [{"method": "hard", "weight": 0.5}],
    "student": {"model": "vit_nano", "patch_size": 4, "attention": {"kind": "area", "max_area": 2, "blocks": [0, 1]}},
}


def test_an_empty_recipe_is_plain_training() -> None:
    recipe = from_mapping({})
    assert (recipe.teachers, recipe.distill, recipe.control, recipe.label_weight) == ([], [], False, 1.0)


def test_the_label_weight_leaves_room_for_distillation_unless_given() -> None:
    assert from_mapping(DISTILLED).label_weight == 0.5
    assert from_mapping({**DISTILLED, "label_weight": 0.8}).label_weight == 0.8
    assert from_mapping({**DISTILLED, "label_weight": 0.0}).label_weight == 0.0


def test_one_teacher_a_list_and_none_read_alike() -> None:
    assert from_mapping({"teacher": None}).teachers == []
    (one,) = from_mapping({"teacher": {"model": "a"}}).teachers
    assert [teacher.model for teacher in from_mapping({"teacher": [{"model": "a"}, {"model": "b"}]}).teachers] == [
        "a",
        "b",
    ]
    assert from_mapping({"teacher": [{"model": "a"}]}).teachers == [one]


def test_a_recipe_is_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "my run.yaml").write_text("seed: 3\n")
    (tmp_path / "other.yaml").write_text("seed: 0\n")
    (tmp_path / "named.yaml").write_text("name: other\n")
    assert load(tmp_path / "my run.yaml").name == "my-run"
    assert load(tmp_path / "other.yaml").name == "other"
    assert load(str(tmp_path / "named.yaml")).name == "other"


def test_recipes_do_not_change() -> None:
    recipe = from_mapping(DISTILLED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    raw = {"train": {"epochs": 3}}
    from_mapping(raw, ["train.epochs=4"])
    assert raw == {"train": {"epochs": 3}}


def test_the_resolved_recipe_loads_back_equal(tmp_path: Path) -> None:
    for raw in (
        {},
        DISTILLED,
        {"teacher": [{"model": "a", "mean": [0.5], "std": [0.25]}, {"recipe": "r.yaml", "weight": 2}]},
    ):
        recipe = from_mapping(raw, ["optim.lr=1e-3", "data.augment.random_resized_crop={}", "train.ema=0.99996"])
        path = tmp_path / "resolved.yaml"
        path.write_text(recipe.to_yaml())
        again = load(path)
        assert again == recipe
        assert again.to_yaml() == recipe.to_yaml()
        assert again.digest() == recipe.digest()


def test_digest_and_flat_tell_what_differs() -> None:
    one, other = from_mapping(DISTILLED), from_mapping(DISTILLED, ["train.log_every=1", "teacher.weights=w.pth"])
    changed = {key for key, value in one.flat().items() if other.flat()[key] != value}
    assert changed == {"train.log_every", "teacher.weights"}
    assert one.digest() != other.digest()
    assert one.digest([*OPERATIONAL_KEYS, "teacher.weights"]) == other.digest([*OPERATIONAL_KEYS, "teacher.weights"])
    assert one.flat().keys() >= OPERATIONAL_KEYS
    vit = from_mapping({}, ["student.init=null"])
    assert vit.digest() == from_mapping({}).digest() == vit.digest(["student.init"])  # older runs are still found
    assert vit.digest() != from_mapping({}, ["student.init={kind: mimetic}"]).digest()


def test_a_linear_projection_is_not_in_digests() -> None:
    """Which are those of recipes from before there were others."""
    flat = {"distill.0.method": "guide", "distill.0.projection": None}
    one, other = ({"distill": [{"method": "guide"} | more]} for more in ({}, {"projection": "orthogonal"}))
    recipe = from_mapping(DISTILLED | one)
    assert flat.items() <= recipe.flat().items()
    later = ("distill.0.projection", "student.init")
    before = {key: value for key, value in recipe.flat().items() if key not in later}
    assert recipe.digest() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert from_mapping(DISTILLED | other).digest() != recipe.digest()


def test_overrides_are_yaml_at_dotted_paths() -> None:
    recipe = from_mapping(
        {"teacher": None, "distill": [{"method": "hard", "weight": 0.3}]},
        [
            "teacher.model=cifar_resnet56",
            "optim.lr=1e-3",
            "distill.0.weight=0.7",
            "train.ema=null",
            "control=true",
            "student.attention={kind: area, max_area: [1, 2]}",
            "student.attention.blocks=[2]",
            "data.augment.random_resized_crop.scale=[0.2, 1]",
            "train.trackers=[tensorboard]",
            "data.root=a=b",
            "name=second",
            "seed=1",
            "seed=2",
        ],
    )
    assert [teacher.model for teacher in recipe.teachers] == ["cifar_resnet56"]
    assert recipe.optim.lr == 1e-3
    assert recipe.distill[0].weight == 0.7
    assert recipe.train.ema is None
    assert recipe.control is True
    assert recipe.student.attention.model_dump()["max_area"] == [1, 2]
    assert recipe.student.attention.model_dump()["blocks"] == [2]
    assert recipe.data.augment.random_resized_crop is not None
    assert recipe.data.augment.random_resized_crop.scale == [0.2, 1]
    assert recipe.train.trackers == ["tensorboard"]
    assert recipe.data.root == "a=b"
    assert (recipe.name, recipe.seed) == ("second", 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load(path)
    for spec in recipe.teachers:
        if spec.recipe is not None:
            assert not Path(spec.recipe).is_absolute()
            assert load(ROOT / spec.recipe).data.name == recipe.data.name
    for key, value in recipe.flat().items():
        assert not (isinstance(value, str) and value.startswith(("/", "~", ".."))), f"{key} leaves the repository"


def test_the_quickstart_needs_no_download() -> None:
    recipe = load(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.data.name == "digits"
    assert recipe.control
    assert all(spec.recipe is not None for spec in recipe.teachers)
    assert recipe.student.attention.kind == "area"


def schema_properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, section in (("Recipe", schema), *schema["$defs"].items()):
        for key, value in section["properties"].items():
            yield f"{name}.{key}", value


def test_the_json_schema_explains_every_key() -> None:
    schema = json.loads(json.dumps(recipe_model({}).model_json_schema()))
    found = dict(schema_properties(schema))
    assert {"Recipe.seed", "Data.name", "Augment.mixup"} <= set(found)
    for variant, key in (("students__attention__area", "key_mode"), ("methods__soft", "temperature")):
        assert f"distill__{variant}__options__Options.{key}" in found
    for key, value in found.items():
        assert len(value.get("description", "")) > 8, f"{key} has no line of help"
        assert "\n" not in value["description"]
        assert "default" in value, f"{key} has no default"
    assert schema["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())


def test_sizes_have_heads_that_divide_their_width() -> None:
    assert list(VIT_SIZES) == ["vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    assert all(size.width % size.heads == 0 for size in VIT_SIZES.values())
    assert VIT_SIZES["vit_nano"]._asdict() == {"width": 96, "depth": 6, "heads": 3}


HEAVY = "{'torch', 'torchvision', 'timm', 'accelerate', 'numpy', 'matplotlib'} & set(sys.modules)"


def test_a_recipe_needs_no_torch() -> None:
    code = f"import sys, distill.recipe; print({HEAVY})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("arguments", [["validate", "recipes/quickstart.yaml"], ["schema"]])
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    code = f"import sys; from distill.cli import main; assert main({arguments}) == 0; print({HEAVY}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1] == "set()"
    if arguments == ["schema"]:
        assert json.loads(done.stdout) == recipe_model({}).model_json_schema()


def test_validation_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from distill.cli import main; main(['validate', 'recipes/quickstart.yaml'])\n"
        "heavy = {'torch', 'timm', 'torchvision', 'accelerate', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
