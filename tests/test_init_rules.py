"""The rules of `distill init`, against docs/reference/init.md and by their values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill.errors import InputError
from distill.recipe import from_mapping, read_yaml
from distill.scaffold import contents, rules
from distill.scaffold.rules import BUDGETS, GOALS, Goal, Images

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "reference" / "init.md").read_text(encoding="utf-8")
CLOTHES = Images({"hat": 112, "shoes": 795, "shirt": 2161}, validation=341, test=372, side=128, stretch=1.3, grey=False)


def rows(first: str) -> list[list[str]]:
    """Cells of the table of docs/reference/init.md whose header begins with these cells."""
    lines = DOCS.partition(f"| {first} |")[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_docs_have_the_budgets() -> None:
    stated = {}
    for goal, device, seen, epochs, largest, grids in rows("goal | device | images seen"):
        fewest, most = map(int, epochs.split(" to "))
        sides = tuple(map(int, grids.split(", ")))
        stated[goal, device == "GPU"] = rules.Budget(number(seen), fewest, most, int(largest), sides)
    assert stated == BUDGETS
    assert {goal for goal, _ in BUDGETS} == set(GOALS)


def test_the_docs_have_the_students() -> None:
    table = rows("goal | device | training images | student")
    assert len(table) == 5
    for goals, device, images, model in table:
        found = re.search(r"[\d,]+", images)
        limit = number(found[0]) if found else 1000
        for goal in GOALS:
            for gpu in (False, True):
                if goal in goals.split(", ") and device in ("any", "GPU" if gpu else "CPU"):
                    at = limit - 1 if images.startswith("below") else limit
                    assert rules.student(at, goal, gpu=gpu) == model.split("`")[1]


@pytest.mark.parametrize(
    ("side", "goal", "gpu", "expected"),
    [
        (28, "small", False, (32, 4)),
        (8, "fast", True, (32, 4)),
        (32, "accurate", True, (32, 4)),
        (63, "small", False, (32, 4)),
        (64, "small", False, (64, 8)),
        (128, "small", False, (64, 8)),
        (128, "accurate", False, (96, 8)),
        (128, "small", True, (128, 16)),
        (128, "fast", True, (64, 8)),
        (128, "accurate", True, (128, 16)),
        (500, "accurate", True, (224, 16)),
        (50, "accurate", True, (48, 4)),
    ],
)
def test_resolution_and_patch(side: int, goal: Goal, gpu: bool, expected: tuple[int, int]) -> None:
    assert rules.resolution_and_patch(side, goal, gpu=gpu) == expected


def test_epochs_and_batches() -> None:
    assert [rules.epochs(3068, goal, gpu=False) for goal in GOALS] == [33, 65, 16]
    assert rules.epochs(50_000, "accurate", gpu=False) == 20  # recipes/cifar10/laptop.yaml
    assert rules.epochs(20, "small", gpu=False) == 200
    sizes = [rules.batch_size(images, gpu=False) for images in (3, 10, 100, 1500, 3068, 45_000)]
    assert sizes == [2, 8, 16, 32, 64, 128]
    assert rules.batch_size(45_000, gpu=True) == 512


def test_holdouts() -> None:
    assert rules.holdouts(CLOTHES) == {}
    without = CLOTHES._replace(validation=None, test=None)
    assert rules.holdouts(without) == {"test": 0.2, "validation": 0.1}
    assert rules.trained_on(without) == 3068 - 614 - 245
    assert rules.holdouts(without._replace(test=5)) == {"validation": 0.1}
    assert rules.holdouts(without._replace(counts={"a": 30_000, "b": 30_000})) == {"test": 0.1, "validation": 0.02}
    assert rules.holdouts(without._replace(counts={"a": 5, "b": 5})) == {"test": 0.2, "validation": 0.25}
    for counts, wanted in (({"a": 9, "b": 4}, 5), ({"a": 9, "b": 3}, 4)):
        test = None if wanted == 5 else 7
        with pytest.raises(InputError, match=rf"class 'b' has {counts['b']} image.*{wanted} or more"):
            rules.holdouts(without._replace(counts=counts, test=test))


def test_what_depends_on_the_images() -> None:
    assert rules.augmentation(32, grey=True, seen=10, epochs=5) == {"hflip": False, "crop_padding": 4}
    plain = rules.augmentation(64, grey=False, seen=10, epochs=5)
    assert plain == {"hflip": True, "random_resized_crop": {"scale": [0.4, 1.0]}}
    strong = rules.augmentation(64, grey=False, seen=2_000_001, epochs=50)
    assert strong.keys() - plain.keys() == {"rand_augment", "random_erasing", "mixup", "cutmix", "mix_off_epoch"}
    assert strong["mix_off_epoch"] == 45
    assert [rules.fit(stretch) for stretch in (1.0, 1.34, 1.5, 3.0)] == ["crop", "crop", "pad", "pad"]
    assert [rules.teacher(side) for side in (32, 56, 64, 224)] == ["cifar_resnet20"] * 2 + ["resnet18"] * 2


def test_optimizer_average_and_methods() -> None:
    assert rules.optimizer(1_000_000, 20) == {
        "name": "nmuon", "lr": 3e-3, "momentum": 0.95, "weight_decay": 0.05, "warmup_epochs": 1,
    }  # fmt: skip
    assert rules.optimizer(3_000_000, 300)["name"] == "adamw"
    assert rules.optimizer(3_000_000, 300)["warmup_epochs"] == 10
    assert [rules.ema(steps) for steps in (10, 2000, 10**6)] == [0.95, 0.99, 0.999]
    named = {
        (logits, maps): [one["method"] for one in rules.methods(logits=logits, maps=maps)]
        for logits in (True, False)
        for maps in (True, False)
    }
    assert named == {
        (True, True): ["hard", "guide"],
        (True, False): ["soft"],
        (False, True): ["guide"],
        (False, False): [],
    }


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("split", [True, False])
def test_recipes_are_valid_and_say_what_the_rules_say(goal: Goal, gpu: bool, split: bool) -> None:
    images = CLOTHES if split else CLOTHES._replace(validation=None, test=None, stretch=1.6)
    wanted = contents.Wanted("my photos: all, #1", images, goal, gpu, "bf16", True)
    teacher = {"model": "resnet18", "weights": "w [1].pth", "size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    for content in (
        contents.student_recipe(wanted, teacher, logits=True, maps=True),
        contents.student_recipe(wanted, {"recipe": "x-teacher.yaml"}, logits=False, maps=True),
        contents.teacher_recipe(wanted),
    ):
        text = contents.written(
            content, ["A recipe", "", "  distill train it\nseed: 7"], {"data.root": "here", "train": "x"}
        )
        assert text.startswith("# A recipe\n#\n#   distill train it\\nseed: 7\ndata:")
        assert read_yaml(text, source="it") == content
        recipe = from_mapping(content)
        assert recipe.data.root == "my photos: all, #1"
        assert recipe.data.test == (None if split else 0.2)
        assert recipe.data.fit == ("crop" if split else "pad")
        assert len(text.splitlines()) + 2 < 35  # two more lines of header


@pytest.mark.parametrize(("largest", "said"), [(149, False), (150, True)])
def test_unbalanced_classes_are_pointed_out_and_left_as_they_are(largest: int, said: bool) -> None:
    images = CLOTHES._replace(counts={"hat": 100, "shoes": largest, "shirt": 120})
    wanted = contents.Wanted("photos", images, "small", False, "bf16", False)
    content = contents.student_recipe(wanted, {"model": "resnet18"}, logits=True, maps=True)
    assert ("class_weights" in content["data"]) is said
    assert from_mapping(content).data.class_weights is None
