"""Pyramids in recipes: what fits, and one message, before torch is loaded, for what does not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from distill.errors import InputError
from distill.recipe import from_mapping

VIT: dict[str, Any] = {
    "teacher": {"model": "cifar_resnet20"},
    "distill": [{"method": "hard", "weight": 0.5}, {"method": "guide"}],
    "student": {"model": "vit_nano", "distillation_token": True, "drop_path": 0.1},
}
NANO = ["focal_nano", "regionvit_nano", "lg_nano"]


def problems(student: dict[str, Any], **data: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        from_mapping({"data": data, "student": student}, source="r.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"r.yaml: {len(lines)} problem(s) in the recipe:"
    return lines


@pytest.mark.parametrize("model", NANO)
@pytest.mark.parametrize("changes", [{}, {"data": {"growth": {"start": 16}}}], ids=str)
def test_a_recipe_of_a_vit_needs_another_model_only(model: str, changes: dict[str, Any]) -> None:
    recipe = from_mapping(VIT | changes, [f"student.model={model}"], source="r.yaml")
    assert recipe.student.model == model
    assert recipe.student.family != "vit"
    assert recipe.label_weight == 0.5


DOES_NOT_FIT: list[tuple[str, dict[str, Any], str, str]] = [
    ("focal_nano", {"window": 17}, "student.window", "a window of 17 is larger than the first grid of 16x16"),
    ("focal_nano", {"focal_windows": [3, 2, 1]}, "student.focal_windows", "odd numbers of windows a side, got 2"),
    ("focal_nano", {"focal_windows": [3, 1]}, "student.focal_windows", "one number for each of 3 stages, got 2"),
    ("focal_nano", {"heads": [3, 5, 12]}, "student.heads", "a width of 96 does not divide into 5 heads"),
    ("focal_nano", {"attention": {"kind": "area"}}, "student.attention", "focal_nano has an attention of its own"),
    ("focal_tiny", {}, "student.model", "4 stages is too deep for data.resolution 32"),
    ("lg_nano", {"paths": [2]}, "student.paths", "one number for each of 3 stages, got 1"),
    ("lg_nano", {"path": [1, 1, 1]}, "student.path", "unknown key; did you mean 'paths'?"),
    ("lg_nano", {"width": 50}, "student.width", "a width of 50 does not divide into 3 heads"),
    ("lg_nano", {"stem": "conv"}, "student.stem", "lg_nano has a stem of its own; leave it out"),
    ("lg_nano", {"pretrained": True}, "student.pretrained", "lg_nano has no weights in timm; set it to false"),
    ("lg_nano", {"depths": [1] * 5, "heads": [1] * 5}, "student.depths", "5 stages is too deep"),
    ("regionvit_nano", {"heads": [3, 6]}, "student.heads", "one number for each stage in both: 3 depths and 2 heads"),
    ("regionvit_nano", {"patch_size": 4}, "student.patch_size", "regionvit_nano has patches of 2 px; leave it out"),
    (
        "regionvit_nano",
        {"window": 5},
        "student.window",
        "not divisible by the regions of 5x5 patches of 2 px, so by 10",
    ),
]


@pytest.mark.parametrize(("model", "options", "key", "words"), DOES_NOT_FIT, ids=str)
def test_an_option_that_does_not_fit_is_one_message_with_its_key(
    model: str, options: dict[str, Any], key: str, words: str
) -> None:
    (line,) = problems({"model": model, **options})
    assert line.startswith(f"  {key}: ")
    assert words in line


@pytest.mark.parametrize(
    ("model", "data", "key", "words"),
    [
        (
            "regionvit_tiny",
            {"resolution": 192},
            "data.resolution",
            "192 is not divisible by the regions of 7x7 patches",
        ),
        ("focal_nano", {"resolution": 33}, "data.resolution", "33 is not divisible by the patch size 2"),
        ("lg_nano", {"resolution": 8}, "student.model", "too deep for data.resolution 8"),
        ("lg_nano", {"resolution": 1024}, "data.resolution", "512x512 patches need too much memory"),
        ("lg_nano", {"growth": {"start": 15}}, "data.growth.start", "15 is not divisible by the patch size 2"),
        ("regionvit_nano", {"growth": {"start": 20}}, "data.growth.start", "20 is not divisible by the regions of 4x4"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_one_message_with_its_key(
    model: str, data: dict[str, Any], key: str, words: str
) -> None:
    (line,) = problems({"model": model}, **data)
    assert line.startswith(f"  {key}: ")
    assert words in line


def test_maps_are_those_of_stages() -> None:
    guided = VIT | {"distill": [{"method": "guide", "pairs": [{"block": 3}]}]}
    with pytest.raises(InputError, match=r"distill\.0\.pairs: .*lg_nano has blocks 0 to 2, got \[3\]"):
        from_mapping(guided, ["student.model=lg_nano"], source="r.yaml")
    assert from_mapping(guided, ["student.model=lg_nano", "distill.0.pairs=[{block: 2}]"], source="r.yaml")


def test_a_head_that_nothing_teaches() -> None:
    with pytest.raises(InputError, match=r"distill\.0\.weight: always 0: the distillation head"):
        from_mapping(
            VIT | {"distill": [{"method": "hard", "weight": 0}]}, ["student.model=focal_nano"], source="r.yaml"
        )


def test_validation_is_without_torch() -> None:
    code = (
        "import sys\nfrom distill.recipe import from_mapping\n"
        f"for model in {NANO}: from_mapping({{'student': {{'model': model}}}}, source='r.yaml')\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
