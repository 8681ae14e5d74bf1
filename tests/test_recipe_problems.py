"""What is wrong with a recipe: all of it at once, each problem under its path, with the nearest known key."""

from __future__ import annotations

from typing import Any

import pytest

from distill.errors import InputError
from distill.recipe import from_mapping

DISTILLED: dict[str, Any] = {
    "teacher": {"model": "cifar_resnet20"},
    "distill": [{"method": "hard", "weight": 0.5}],
    "student": {"model": "vit_nano", "patch_size": 4, "attention": {"kind": "area", "max_area": 2, "blocks": [0, 1]}},
}


def problems(raw: dict[str, Any], *overrides: str) -> dict[str, str]:
    """Path -> message (or messages) of everything that is wrong with a recipe."""
    with pytest.raises(InputError) as caught:
        from_mapping(raw, overrides, source="r.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"r.yaml: {len(lines)} problem(s) in the recipe:"
    found: dict[str, str] = {}
    for line in lines:
        path, message = line.removeprefix("  ").split(": ", 1)
        found[path] = f"{found[path]}; {message}" if path in found else message
    return found


def test_all_problems_come_at_once_under_their_paths() -> None:
    found = problems(
        {
            "sed": 1,
            "data": {"resolution": 30, "select_on": "train"},
            "student": {"patch_size": 4, "attention": {"kind": "area", "max_area": 2, "blocks": [0, 12, 13]}},
            "distill": [{"method": "hard", "weight": -1}, {"method": "hard", "weight": 1}],
            "train": {"epochs": "3", "batch_size": 9, "gradient_accumulation": 2},
            "control": 1,
        },
        "optim.lr.x=1",
    )
    assert set(found) == {
        "sed",
        "data.select_on",
        "student.patch_size",
        "student.attention.blocks",
        "distill",
        "distill.0.weight",
        "optim.lr",
        "train.epochs",
        "train.batch_size",
        "control",
    }
    assert "needs a teacher" in found["distill"]
    assert "at most once" in found["distill"]
    assert "data.resolution 30 is not divisible by the patch size 4" in found["student.patch_size"]
    assert "[12, 13]" in found["student.attention.blocks"]
    assert "got '3'" in found["train.epochs"]


@pytest.mark.parametrize(
    ("raw", "path", "suggestion"),
    [
        ({"studnet": {}}, "studnet", "'student'"),
        ({"data": {"resolutoin": 32}}, "data.resolutoin", "'resolution'"),
        ({"data": {"augment": {"cut_mix": 1.0}}}, "data.augment.cut_mix", "'cutmix'"),
        (
            {"data": {"augment": {"random_resized_crop": {"scal": [0.1, 1.0]}}}},
            "data.augment.random_resized_crop.scal",
            "'scale'",
        ),
        ({"student": {"attention": {"kind": "area", "max_aera": 2}}}, "student.attention.max_aera", "'max_area'"),
        ({"student": {"attention": {"kind": "standard", "max_area": 2}}}, "student.attention.max_area", ""),
        ({"teacher": {"model": "a", "wieghts": "w"}}, "teacher.wieghts", "'weights'"),
        ({"teacher": [{"model": "a"}, {"model": "a", "wieghts": "w"}]}, "teacher.1.wieghts", "'weights'"),
        (
            {"teacher": {"model": "a"}, "distill": [{"method": "hard"}, {"method": "soft", "temprature": 2.0}]},
            "distill.1.temprature",
            "'temperature'",
        ),
        ({"epochs": 3}, "epochs", "'train.epochs'"),
        ({"train": {"lr": 0.1}}, "train.lr", "'optim.lr'"),
        ({"train": {"qqqq": 0.1}}, "train.qqqq", "batch_size"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(raw: dict[str, Any], path: str, suggestion: str) -> None:
    found = problems(raw)
    assert list(found) == [path]
    assert found[path].startswith("unknown key")
    assert suggestion in found[path]


@pytest.mark.parametrize(
    ("raw", "path", "wrong", "right"),
    [
        ({"student": {"attention": {"knid": "area"}}}, "student.attention", "knid", "kind"),
        ({"teacher": {"model": "a"}, "distill": [{"methdo": "hard"}]}, "distill.0", "methdo", "method"),
    ],
)
def test_a_mistyped_key_that_chooses_among_shapes_is_suggested_too(
    raw: dict[str, Any], path: str, wrong: str, right: str
) -> None:
    found = problems(raw)
    text = " ".join(f"{key}: {message}" for key, message in found.items())
    assert f"{path}.{wrong}" in found
    assert f"'{right}'" in text


@pytest.mark.parametrize("raw", [{"student": {"attention": {"max_area": 2}}}, {"distill": [{"weight": 0.5}]}])
def test_a_missing_choice_among_shapes_is_said_in_words_of_the_recipe(raw: dict[str, Any]) -> None:
    text = " ".join(problems(raw | {"teacher": {"model": "a"}}).values())
    assert "discriminator" not in text
    assert "kind" in text or "method" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size='3'", ["integer", "'3'"]),
        ("train.batch_size=3.0", ["integer", "3.0"]),
        ("train.batch_size=true", ["integer", "True"]),
        ("train.epochs=true", ["number", "True"]),
        ("train.epochs=0", ["greater than 0"]),
        ("train.batch_size=null", ["integer", "None"]),
        ("seed=-1", ["greater than or equal to 0"]),
        ("optim.lr=fast", ["number", "'fast'"]),
        ("optim.lr=.nan", ["nan"]),
        ("control=1", ["boolean", "1"]),
        ("control='yes'", ["boolean", "'yes'"]),
        ("name=1", ["string"]),
        ("name=a/b", ["letters, digits", "a/b"]),
        ("data.root=''", ["at least 1"]),
        ("data=3", ["3"]),
        ("data=null", ["None"]),
        ("teacher=resnet", ["'resnet'"]),
        ("teacher=[]", ["at least 1"]),
        ("distill={method: hard}", ["list"]),
        ("train.precision=fp8", ["'fp32', 'bf16' or 'fp16'", "'fp8'"]),
        ("train.compile=yes please", ["'auto'", "boolean"]),
        ("teacher.source=avarage", ["source", "'avarage'", "--plugin"]),
        ("student.attention.kind=aera", ["aera", "'standard', 'area'"]),
        ("data.augment.random_erasing=1.5", ["less than or equal to 1"]),
        ("data.augment.random_resized_crop={scale: [0.1]}", ["at least 2"]),
        ("data.augment.rand_augment.magnitude=11", ["less than or equal to 10"]),
        ("data.augment.rand_augment.num_ops=0", ["greater than or equal to 1"]),
        ("data.augment.color_jitter.hue=0.6", ["less than or equal to 0.5"]),
        ("data.augment.trivial_augment=1", ["boolean", "1"]),
        ("student.drop_path=1", ["less than 1"]),
        ("data.class_weights=[1.0, 0.0]", ["greater than 0"]),
        ("data.class_weights=[1, -2]", ["greater than 0"]),
        ("data.class_weights=[1]", ["at least 2"]),
        ("data.class_weights=even", ["'balanced'", "'even'"]),
        ("data.sampler=random", ["'balanced'", "'random'"]),
        ("data.long_tail=1", ["greater than 1"]),
        ("train.select=worst", ["'top1' or 'macro'", "'worst'"]),
    ],
)
def test_wrong_values_are_refused_without_a_guess(override: str, words: list[str]) -> None:
    found = problems({}, override)
    assert len(found) == 1
    (path, message) = next(iter(found.items()))
    assert override.partition("=")[0].startswith(path) or path.startswith(override.partition("=")[0])
    assert all(word in message for word in words)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
@pytest.mark.parametrize(
    "key",
    ["optim.lr", "optim.weight_decay", "optim.warmup_epochs", "data.validation", "data.augment.mixup", "label_weight"],
)
def test_numbers_are_finite(key: str, value: str) -> None:
    assert list(problems({}, f"{key}={value}")) == [key]


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["data.resolution=30", "student.patch_size=4"], "student.patch_size", "not divisible"),
        (["data.validation=1.5"], "data.validation", "1.5"),
        (["data.test=2.5"], "data.test", "2.5"),
        (["data.select_on=test"], "data.select_on", "validation to 0"),
        (["data.augment={crop_padding: 4, random_resized_crop: {}}"], "data.augment.crop_padding", "exclude"),
        (["data.augment={rand_augment: {}, trivial_augment: true}"], "data.augment.rand_augment", "exclude"),
        (
            ["data.augment.random_resized_crop.scale=[0.5, 0.2]"],
            "data.augment.random_resized_crop.scale",
            "smallest, then largest",
        ),
        (["teacher={}", "distill=[]"], "teacher.model", "either a model or a recipe"),
        (["teacher.recipe=r.yaml"], "teacher.model", "not both"),
        (["teacher={recipe: r.yaml, weights: w.pth}"], "teacher.weights", "its own weights"),
        (["teacher.mean=[0.5]", "teacher.std=[0.2, 0.2]"], "teacher.mean", "channels"),
        (["teacher.std=[0.0]"], "teacher.std", "above 0"),
        (["student.pretrained=true", "student.weights=e"], "student.pretrained", "not from both"),
        (["student={model: resnet18, patch_size: 4}"], "student.patch_size", "vit_nano"),
        (["student={model: resnet18, distillation_token: true}"], "student.distillation_token", "resnet18"),
        (["student.stem=conv", "data.resolution=36", "student.patch_size=6"], "student.stem", "power of 2"),
        (["student.attention.blocks=[6]"], "student.attention.blocks", "0 to 5, got [6]"),
        (["student.attention.blocks=[-1]"], "student.attention.blocks", "got [-1]"),
        (["student.attention.blocks=[0, 0]"], "student.attention.blocks", "duplicate"),
        (["student.attention.max_area=0"], "student.attention.max_area", "1 to the 66 tokens"),
        (["student.attention.max_area=67"], "student.attention.max_area", "66 tokens, got 67"),
        (
            ["student.attention.max_area=66", "student.distillation_token=false"],
            "student.attention.max_area",
            "65 tokens",
        ),
        (["student.attention.max_area=[2, 9]"], "student.attention.max_area", "8x8"),
        (["student.attention={kind: focal, window: 9}"], "student.attention.window", "8x8 patch grid, got 9"),
        (["student.attention={kind: focal, window: 4, expand: 9}"], "student.attention.expand", "from 0 to the side"),
        (["student.attention={kind: focal, focal_window: 2}"], "student.attention.focal_window", "an odd number"),
        (["student.attention={kind: focal, blocks: [6]}"], "student.attention.blocks", "0 to 5, got [6]"),
        (["student.attention={kind: refiner, kernel_size: 2}"], "student.attention.kernel_size", "an odd number"),
        (
            ["student.attention={kind: refiner, share: true}", "train.gradient_checkpointing=true"],
            "train.gradient_checkpointing",
            "share maps",
        ),
        (["teacher=null"], "distill", "needs a teacher"),
        (["distill=[{method: hard}, {method: hard}]"], "distill", "at most once"),
        (["label_weight=0", "distill.0.weight=0"], "label_weight", "nothing would be learned"),
        (["distill=[{method: hard, weight: 0}]"], "distill.0.weight", "would not be trained"),
        (["distill=[]", "control=true"], "control", "same run"),
        (["train.batch_size=10", "train.gradient_accumulation=4"], "train.batch_size", "4 micro-batches"),
        (["train.batch_size=9", "data.augment.mixup=0.8"], "train.batch_size", "pairs"),
        (["optim.min_lr=0.1"], "optim.min_lr", "0.001"),
        (["data.class_weights=balanced", "data.sampler=balanced"], "data.class_weights", "equally often already"),
        (["data.class_weights=[1, 2]", "distill=[{method: guide}]", "label_weight=0"], "data.class_weights", "nothing"),
        (["train.select=macro", "distill=[{method: guide}]", "label_weight=0"], "train.select", "neighbours"),
        (["train.select=macro", "data.validation=0"], "train.select", "nothing is selected"),
        (["data={name: wds/x, sampler: balanced}"], "data.sampler", "order, and its classes are not counted"),
        (["data={name: tfds/x, class_weights: [1, 2]}"], "data.class_weights", "random access"),
        (["data={name: hfids/x, long_tail: 10}"], "data.long_tail", "set it to null"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], path: str, words: str) -> None:
    found = problems(DISTILLED, *overrides)
    assert path in found
    assert words in found[path]
    assert len(found) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.attention.max_area=66"],
        ["student.attention.max_area=[8, 8]"],
        ["student.attention={kind: focal, window: 8, expand: 8, focal_window: 1}"],
        ["student.attention={kind: focal, window: 1, expand: 0, focal_window: 15}"],
        ["student.attention={kind: performer, features: 1, redraw: 0}"],
        ["student.attention={kind: refiner, kernel_size: 1, expansion: 1, scale: 0.5}"],
        ["student.attention.blocks=[]"],
        ["student.attention.blocks=[5, 0]"],
        ["data.validation=5000"],
        ["data.validation=0", "data.select_on=test", "train.select=macro"],
        ["data.class_weights=[1, 2.5]", "data.sampler=balanced", "data.long_tail=1.5"],
        ["student={model: resnet18, pretrained: true}"],
        ["optim.warmup_epochs=1000", "train.epochs=1"],
        ["train.batch_size=12", "train.gradient_accumulation=3", "data.augment.cutmix=1.0"],
        ["optim.lr=1", "optim.min_lr=1"],
        ["teacher=[{model: a}, {model: b, weight: 3}]"],
        ["data.augment={rand_augment: {}, color_jitter: {hue: 0.5}, trivial_augment: false}"],
        ["distill=[{method: soft, temperature: 4}, {method: hard, weight: 0}]"],
        ["distill=[{method: guide, weight: 0}]"],
        ["student={model: resnet18}", "distill=[{method: soft, weight: 0}]"],
    ],
)
def test_possible_combinations_at_their_limits_are_accepted(overrides: list[str]) -> None:
    from_mapping(DISTILLED, overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", "key=value"),
        ("=3", "key=value"),
        ("train..epochs=3", "key=value"),
        ("teacher.2.model=a", "list of 1"),
        ("teacher.x.model=a", "list of 1"),
        ("teacher.-1.model=a", "list of 1"),
        ("seed.x=3", "single value"),
        ("seed=[1", "not valid YAML"),
        ("trian.epochs=3", "'train'"),
        ("train.epohcs=3", "'epochs'"),
        ("teacher.0.modle=3", "'model'"),
    ],
)
def test_bad_overrides_are_problems_like_all_others(override: str, words: str) -> None:
    found = problems({"seed": 1, "teacher": [{"model": "a"}], "optim": {"lr": -1}}, override)
    assert "optim.lr" in found
    assert len(found) == 2
    assert any(words in message for message in found.values())
