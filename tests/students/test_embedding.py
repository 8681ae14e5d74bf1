"""Embeddings and regions of students, and students without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from distill.errors import InputError
from distill.exports.folder import load_export, write_export
from distill.recipe.loading import from_mapping
from distill.students import Student, build_student
from tests.conftest import some
from tests.students.helpers import student_options

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def student_of(num_classes: int = 10, resolution: int = 32, **keys: Any) -> Student:
    return build_student(
        student_options(**keys),
        resolution=resolution,
        num_classes=num_classes,
        channels=3,
        mean=MEAN,
        std=STD,
        seed=3,
    )


def images_of(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("kind", ["standard", "area"])
def test_a_vits_embedding_is_its_class_token_after_the_norm(token: bool, kind: str) -> None:
    student = student_of(model="vit_nano", patch_size=8, distillation_token=token, attention={"kind": kind}).eval()
    features, model = student(images_of(), (1,), embed=True), student.model
    x = model.patch_embed(normalised(images_of()))
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    for block in model.blocks:
        x = block(x)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    x = (x - mean) / (variance + model.norm.eps).sqrt() * model.norm.weight + model.norm.bias
    torch.testing.assert_close(features.embedding, x[:, 0])
    torch.testing.assert_close(features.regions, x[:, 2 if token else 1 :])
    plain = student(images_of())
    assert plain.embedding is plain.regions is None
    assert plain.logits.keys() == features.logits.keys()
    for name, logits in plain.logits.items():
        torch.testing.assert_close(features.logits[name], logits)
    assert list(features.maps) == [1]


@pytest.mark.parametrize("model", ["focal_nano", "regionvit_nano"])
def test_a_pyramids_embedding_is_the_mean_of_its_last_map(model: str) -> None:
    student = student_of(model=model).eval()
    features = student(images_of(), embed=True)
    final = student.model.forward_features(normalised(images_of()))
    torch.testing.assert_close(features.embedding, final.mean((1, 2)))
    torch.testing.assert_close(features.regions, final.reshape(3, -1, final.shape[-1]))


@pytest.mark.parametrize(("model", "places"), [("resnet18", 1), ("test_convnext", 4), ("test_vit", 16)])
def test_timms_models_have_an_embedding_too(model: str, places: int) -> None:
    size = 32 if model == "resnet18" else 64
    student = student_of(model=model, resolution=size).eval()
    features = student(images_of(size), embed=True)
    final = student.model.forward_features(normalised(images_of(size)))
    if model == "test_vit":
        embedding, regions = final[:, 0], final[:, 1:]
    elif model == "resnet18":
        embedding, regions = final.mean((2, 3)), final.flatten(2).mT
    else:
        norm = student.model.head.norm
        embedding = torch.layer_norm(final.mean((2, 3)), (final.shape[1],), norm.weight, norm.bias, norm.eps)
        regions = torch.layer_norm(final.flatten(2).mT, (final.shape[1],), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(features.embedding, embedding)
    torch.testing.assert_close(features.regions, regions)
    assert features.regions.shape == (3, places, student.region_width)
    assert student.embedding_width == embedding.shape[1]
    torch.testing.assert_close(student.embedding(images_of(size)), embedding)


@pytest.mark.parametrize(
    "keys", some([{"model": "vit_nano", "patch_size": 8}, {"model": "focal_nano"}, {"model": "resnet18"}])
)
def test_a_student_without_a_head_is_exported_as_its_features(keys: dict[str, Any], tmp_path: Path) -> None:
    student = student_of(0, **keys).eval()
    features = student(images_of(), embed=True)
    assert (student.heads, features.logits, student.logits(images_of())) == ((), {}, {})
    write_export(student, tmp_path / "export", class_names=["a", "b"], metadata={}, readme="")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert model.num_classes == 0
    torch.testing.assert_close(model(normalised(images_of())), features.embedding)
    loaded, names = load_export(tmp_path / "export")
    assert (loaded.heads, names) == ((), [])


def test_a_model_whose_answer_is_not_its_embedding_needs_a_head() -> None:
    with pytest.raises(InputError, match="deit_tiny_distilled_patch16_224 does not give its features"):
        student_of(0, model="deit_tiny_distilled_patch16_224")


def test_which_recipes_are_label_free() -> None:
    guide = {"label_weight": 0.0, "teacher": {"model": "cifar_resnet20"}, "distill": [{"method": "guide"}]}
    assert from_mapping(guide).label_free
    assert not from_mapping(guide | {"label_weight": 0.1}).label_free
    assert not from_mapping(
        guide | {"student": {"distillation_token": False}, "distill": [{"method": "hard"}]}
    ).label_free
    with pytest.raises(InputError, match="without labels and methods on logits"):
        from_mapping(guide | {"student": {"distillation_token": True}})
