"""Students on images of other sizes than their own (`data.views`, `data.growth`): as a student of that size is, with
position embeddings resampled as timm does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from distill.errors import InputError
from distill.students import Student, build_student
from tests.students.helpers import KINDS, student_options

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
KEY = ("data", "views", 1, "size")
AREAS: dict[str, dict[str, Any]] = {
    "areas of 2x2": {"kind": "area", "max_area": [2, 2], "blocks": "all"},
    "areas of 3": {"kind": "area", "max_area": 3, "blocks": [0, 2]},
    "learned keys": {"kind": "area", "max_area": [2, 2], "key_mode": "concat", "blocks": [1]},
}


def build(size: int, others: tuple[int, ...] = (), **spec: Any) -> Student:
    student = build_student(
        student_options(**spec),
        resolution=size,
        num_classes=5,
        channels=3,
        mean=MEAN,
        std=STD,
        seed=0,
        other_sides=dict.fromkeys(others, KEY),
    )
    generator = torch.Generator().manual_seed(1)  # initial position embeddings say little
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def images(side: int) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(side))


def as_built_for(side: int, student: Student, **spec: Any) -> Student:
    """A student of this size, with the weights of another one."""
    other = build(side, **spec)
    state, own = dict(student.state_dict()), other.state_dict()
    assert set(state) == set(own)
    if (name := "model.pos_embed") in state and state[name].shape != own[name].shape:
        prefix = other.model.num_prefix_tokens
        grid = list(other.model.patch_embed.grid_size)
        state[name] = resample_abs_pos_embed(state[name], new_size=grid, num_prefix_tokens=prefix)
    other.load_state_dict(state)
    return other


VITS = [
    pytest.param({"model": "vit_nano", "patch_size": 4} | spec, id=name)
    for name, spec in {
        "standard": {},
        "one token": {"distillation_token": False},
        "conv stem": {"stem": "conv"},
        **{name: {"attention": attention} for name, attention in (AREAS | KINDS).items()},
    }.items()
]


@pytest.mark.parametrize("spec", VITS)
def test_a_vit_on_small_views_is_a_vit_of_their_size(spec: dict[str, Any]) -> None:
    student = build(32, (16, 12), **spec).eval()
    for side in (16, 12):
        expected = as_built_for(side, student, **spec).eval()
        with torch.no_grad():
            found, other = student(images(side), (2, 5), side=side), expected(images(side), (2, 5))
        for head, logits in other.logits.items():
            torch.testing.assert_close(found.logits[head], logits, rtol=1e-4, atol=1e-5)
        for block, stage in other.maps.items():
            assert stage.shape[2:] == (side // 4, side // 4)
            torch.testing.assert_close(found.maps[block], stage, rtol=1e-4, atol=1e-4)
    fixed = build(32, **spec).eval()  # its own size, afterwards
    with torch.no_grad():
        found, other = student(images(32), side=32), fixed(images(32))
        assert all(torch.equal(found.logits[head], logits) for head, logits in other.logits.items())


@pytest.mark.parametrize(
    ("model", "sides"), [("focal_nano", (16, 10)), ("lg_nano", (16, 10)), ("regionvit_nano", (16, 8))]
)
def test_a_pyramid_on_small_views_is_a_pyramid_of_their_size(model: str, sides: tuple[int, ...]) -> None:
    student = build(32, sides, model=model).eval()
    for side in sides:
        expected = as_built_for(max(side, 16), student, model=model).eval()
        with torch.no_grad():
            found, other = student(images(side), side=side), expected(images(side), side=side)
        for head, logits in other.logits.items():
            torch.testing.assert_close(found.logits[head], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["test_vit", "cifar_resnet20"])
def test_timms_models_that_take_any_size(model: str) -> None:
    student = build(32, (16,), model=model).eval()
    with torch.no_grad():
        assert student(images(16), side=16).logits["cls"].shape == (3, 5)
    assert "dynamic_img_size" not in student.model_args


@pytest.mark.parametrize("model", ["gmlp_ti16_224", "test_convnext"])
def test_a_model_of_one_size_is_refused_in_one_message(model: str) -> None:
    with pytest.raises(InputError, match=rf"^data\.views\.1\.size: {model} cannot take images of 16 px \(") as caught:
        build(32, (16,), model=model)
    assert str(caught.value).endswith("Choose another size or student.model.")


def test_views_of_one_size_together_answer_as_one_by_one() -> None:
    student = build(32, (16,), model="vit_nano", patch_size=4, attention=AREAS["areas of 2x2"]).eval()
    with torch.no_grad():
        together = student(torch.cat([images(16), images(16).flip(3)]), side=16).logits["cls"]
        alone = [student(view, side=16).logits["cls"] for view in (images(16), images(16).flip(3))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
