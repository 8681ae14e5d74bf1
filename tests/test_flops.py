"""What `distill.flops` counts of a forward pass, against closed formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from distill.flops import count_flops
from distill.options import StudentOptions
from distill.recipe.pyramids import PyramidOptions
from distill.students import build_student
from distill.students.plain import train_on_cpu
from distill.students.student import Student as Model
from teachers.cifar_resnet import CifarResNet
from tests.conftest import DEVICES
from tests.formulas import cifar_resnet_forward, pyramid_forward, vit_forward
from tests.students.helpers import student_options


def build(spec: StudentOptions, side: int) -> Model:
    half = (0.5, 0.5, 0.5)
    student = build_student(spec, resolution=side, num_classes=10, channels=3, mean=half, std=half, seed=0)
    train_on_cpu(student)  # as a run does
    return student


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("model", "patch", "side", "token"),
    [("vit_nano", 4, 32, True), ("vit_nano", 8, 64, False), ("vit_tiny", 4, 32, True), ("vit_tiny", 16, 224, True)],
)
def test_vit(model: str, patch: int, side: int, token: bool, mode: str) -> None:
    spec = student_options(model=model, patch_size=patch, distillation_token=token)
    student = build(spec, side).train(mode == "train")
    assert count_flops(student, torch.rand(2, 3, side, side)) == 2 * vit_forward(spec, resolution=side, num_classes=10)
    assert student.training == (mode == "train")


@pytest.mark.parametrize("mode", ["train", "eval"])
@DEVICES
@pytest.mark.parametrize(
    "attention", [{"max_area": 2}, {"max_area": [2, 3], "value_mode": "mean"}, {"max_area": 2, "key_mode": "sample"}]
)
def test_areas_are_sums_on_every_device(attention: dict[str, Any], device: str, mode: str) -> None:
    spec = student_options(model="vit_nano", patch_size=4, attention={"kind": "area", **attention})
    student = build(spec, 32).to(device).train(mode == "train")
    counted = count_flops(student, torch.rand(1, 3, 32, 32, device=device))
    assert counted == vit_forward(spec, resolution=32, num_classes=10)


@pytest.mark.parametrize(
    "model", ["focal_nano", "focal_mini", "regionvit_nano", "regionvit_mini", "lg_nano", "lg_mini"]
)
@pytest.mark.parametrize(("side", "two_heads"), [(32, True), (64, False)])
def test_pyramids(model: str, side: int, two_heads: bool) -> None:
    spec = student_options(model=model, distillation_token=two_heads)
    assert isinstance(spec, PyramidOptions)
    counted = count_flops(build(spec, side), torch.rand(1, 3, side, side))
    assert counted == pyramid_forward(spec, resolution=side, num_classes=10)


def test_multi_head_attention_of_torch() -> None:
    """Whose fused kernel of evaluation torch's counter does not know; torchvision's vision transformers have it."""
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=256, num_classes=10).eval()
    patches, tokens, width = 16, 17, 64
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    assert count_flops(model, torch.rand(1, 3, 32, 32)) == (2 * patches * 3 * 8**2 * width + 2 * block + 2 * width * 10)
    assert torch.backends.mha.get_fastpath_enabled()


def test_training_is_three_forward_passes() -> None:
    """Less what the first layer saves, since nobody asks for gradients by pixels."""
    spec = student_options(model="vit_nano", patch_size=4, distillation_token=True)
    student = build(spec, 32)
    for block in student.model.blocks:
        block.attn.fused_attn = False  # the fused kernel computes the logits anew in its backward pass
    with FlopCounterMode(display=False) as counter:
        student(torch.rand(1, 3, 32, 32)).fused.sum().backward()
    formula = 3 * vit_forward(spec, resolution=32, num_classes=10)
    assert counter.get_total_flops() == formula - 2 * 64 * 48 * 96


@pytest.mark.parametrize(("depth", "side"), [(20, 32), (56, 32), (20, 16)])
def test_cifar_resnet(depth: int, side: int) -> None:
    assert cifar_resnet_forward(depth, resolution=side) == count_flops(CifarResNet(depth), torch.rand(1, 3, side, side))
