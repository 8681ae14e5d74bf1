"""Formulas against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.bench.arms import STATISTICS
from distill.bench.flops import cifar_resnet_forward, vit_forward
from distill.recipe.schema import Student
from distill.students import build_student
from teachers.cifar_resnet import CifarResNet


@pytest.mark.parametrize(
    ("model", "patch", "side", "token"),
    [("vit_nano", 4, 32, True), ("vit_nano", 8, 64, False), ("vit_tiny", 4, 32, True), ("vit_tiny", 16, 224, True)],
)
def test_vit(model: str, patch: int, side: int, token: bool) -> None:
    mean, std = STATISTICS
    spec = Student(model=model, patch_size=patch, distillation_token=token)
    student = build_student(spec, resolution=side, num_classes=10, channels=3, mean=mean, std=std, seed=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student.logits(torch.rand(2, 3, side, side))
    assert vit_forward(spec, resolution=side, num_classes=10) * 2 == counter.get_total_flops()


def test_training_is_three_forward_passes() -> None:
    """Less what the first layer saves, since nobody asks for gradients by pixels."""
    mean, std = STATISTICS
    spec = Student(model="vit_nano", patch_size=4, distillation_token=True)
    student = build_student(spec, resolution=32, num_classes=10, channels=3, mean=mean, std=std, seed=0)
    for block in student.model.blocks:
        block.attn.fused_attn = False  # the fused kernel computes the logits anew in its backward pass
    with FlopCounterMode(display=False) as counter:
        heads = student(torch.rand(1, 3, 32, 32))
        assert heads.dist is not None
        (heads.cls.sum() + heads.dist.sum()).backward()
    formula = 3 * vit_forward(spec, resolution=32, num_classes=10)
    assert counter.get_total_flops() == formula - 2 * 64 * 48 * 96


@pytest.mark.parametrize(("depth", "side"), [(20, 32), (56, 32), (20, 16)])
def test_cifar_resnet(depth: int, side: int) -> None:
    network = CifarResNet(depth).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, side, side))
    assert cifar_resnet_forward(depth, resolution=side) == counter.get_total_flops()
