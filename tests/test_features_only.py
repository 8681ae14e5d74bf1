"""`timm.create_model(..., features_only=True)` for the architectures that this project registers with timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import model_entrypoint

import teachers.cifar_resnet
from distill.students import register_models
from distill.students.vit import default_cfgs

register_models()
LARGE = ("base", "large", "huge", "44", "56", "110", "1202")
NAMES = [name for name in (*default_cfgs, *teachers.cifar_resnet.default_cfgs) if not name.endswith(LARGE)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [None, (0, 2)])
@torch.no_grad()
def test_maps_are_those_of_the_whole_model(name: str, indices: Any) -> None:
    assert model_entrypoint(name).__module__.split(".")[0] in ("distill", "teachers")
    size = {"img_size": 32} if "vit" in name else {}
    arguments = size | ({} if indices is None else {"out_indices": indices})
    features = timm.create_model(name, features_only=True, **arguments).eval()
    whole = timm.create_model(name, **size).eval()
    assert not whole.load_state_dict(features.model.state_dict(), strict=False).unexpected_keys
    images = torch.rand(2, 3, 32, 32)
    maps = features(images)
    wanted = 3 if indices is None else list(indices)
    for found, expected in zip(maps, whole.forward_intermediates(images, wanted, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected)
    assert [found.shape[1] for found in maps] == features.feature_info.channels()
    assert [32 // found.shape[2] for found in maps] == features.feature_info.reduction()


def test_distilled_and_with_a_convolutional_stem() -> None:
    arguments = {"img_size": 32, "patch_size": 8, "distilled": True, "stem": "conv"}
    features = timm.create_model("area_vit_nano", features_only=True, **arguments).eval()
    assert [tuple(found.shape) for found in features(torch.rand(1, 3, 32, 32))] == [(1, 96, 4, 4)] * 3
