"""One head alone and both heads merged answer what the student's heads answer."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from distill.errors import InputError
from distill.students import Student, build_student, merge_heads, one_head
from distill.students.heads import MergedHeads
from distill.students.vit import OneHeadVisionTransformer
from tests.students.helpers import KINDS, student_options

AREA = {"kind": "area", "max_area": [2, 2], "blocks": [0, 5]}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(model: str = "vit_nano", **spec: Any) -> Student:
    if model.startswith("vit_"):
        spec = {"patch_size": 8, **spec}
    student = build_student(
        student_options(model=model, **spec),
        resolution=32, num_classes=10, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), seed=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if name.startswith("head"):  # timm's begin with zeros, or nearly so
                parameter.normal_(generator=generator)
    return student.eval()


VITS: list[dict[str, Any]] = [
    {},
    {"attention": AREA},
    {"stem": "conv", "drop_path": 0.1},
    *({"attention": attention | {"blocks": "all"}} for attention in KINDS.values()),
]
PYRAMIDS: list[dict[str, Any]] = [
    {"model": "focal_nano", "drop_path": 0.1},
    {"model": "regionvit_nano", "width": 24},
    {"model": "lg_nano", "paths": [2, 1, 1]},
]


@torch.no_grad()
@pytest.mark.parametrize("spec", [*VITS, *PYRAMIDS], ids=str)
@pytest.mark.parametrize("head", ["cls", "dist"])
def test_one_head_alone_answers_as_it_did_beside_the_other(spec: dict[str, Any], head: str) -> None:
    student = build(**spec)
    before = torch.random.get_rng_state()
    alone = one_head(student, head)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert alone.heads == ("cls",)
    assert torch.equal(alone(IMAGES).fused, student(IMAGES).logits[head])
    assert not alone.training
    of_head = sum(map(torch.numel, student.model.head.parameters()))
    assert sum(map(torch.numel, alone.parameters())) == sum(map(torch.numel, student.parameters())) - of_head
    assert alone.model.get_classifier() is alone.model.head
    assert alone.timm_config(list("abcdefghij"))["pretrained_cfg"]["classifier"] == "head"


@torch.no_grad()
def test_a_student_of_timms_own_name_gives_up_a_head_too() -> None:
    student = build("deit_tiny_distilled_patch16_224")
    alone = one_head(student, "dist")
    assert alone.architecture.startswith("vit_"), "timm's own has two heads"
    assert torch.equal(alone(IMAGES).fused, student(IMAGES).logits["dist"])


def test_a_head_that_is_not_there_cannot_be_taken() -> None:
    with pytest.raises(InputError, match="has one head only"):
        one_head(build(distillation_token=False), "cls")
    student = one_head(build(), "cls")
    with pytest.raises(InputError, match="has one head only"):
        one_head(student, "dist")
    with pytest.raises(ValueError, match="head is 'both', 'cls' or 'dist'"):
        timm.create_model("vit_nano", distilled=True, head="all")
    with pytest.raises(ValueError, match="of a distilled model"):
        timm.create_model("vit_nano", head="cls")


@torch.no_grad()
def test_one_head_gets_new_classes() -> None:
    model = timm.create_model("area_vit_nano", img_size=32, distilled=True, head="dist")
    assert isinstance(model, OneHeadVisionTransformer)
    model.reset_classifier(7)
    assert model(IMAGES).shape == (4, 7)
    assert not hasattr(model, "head_dist")


@torch.no_grad()
@pytest.mark.parametrize("spec", VITS, ids=str)
def test_merged_heads_equal_the_mean_of_both(spec: dict[str, Any]) -> None:
    student = build(**spec)
    expected = student(IMAGES).fused
    merged = merge_heads(student.model)
    assert isinstance(merged, MergedHeads)
    logits = merged(student.adapter(IMAGES))
    assert (logits - expected).norm() / expected.norm() < 1e-5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("spec", PYRAMIDS, ids=str)
def test_heads_on_the_same_features_become_one(spec: dict[str, Any]) -> None:
    student = build(**spec)
    expected, number = student(IMAGES).fused, sum(map(torch.numel, student.parameters()))
    merged = merge_heads(student.model)
    torch.testing.assert_close(merged(student.adapter(IMAGES)), expected, rtol=1e-5, atol=1e-5)
    assert number - sum(map(torch.numel, merged.parameters())) == sum(map(torch.numel, merged.head.parameters()))


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [{"distillation_token": False}, {"model": "resnet18"}, {"model": "lg_nano", "distillation_token": False}],
    ids=str,
)
def test_what_has_nothing_to_merge_stays_as_it_is(spec: dict[str, Any]) -> None:
    model = build(**spec).model
    assert merge_heads(model) is model
    assert not model.training
