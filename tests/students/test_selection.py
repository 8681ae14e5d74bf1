"""Weight selection, against indexing element by element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry

from distill.errors import InputError
from distill.exports.folder import write_export
from distill.students import Student, build_student
from tests.students.helpers import student_options

AREA = {"kind": "area", "max_area": [2, 2], "blocks": [0, 1]}
TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
DEIT = "deit_tiny_distilled_patch16_224.fb_in1k"


def build(source: str | None = None, *, model: str = "vit_nano", resolution: int = 32, **spec: Any) -> Student:
    options = {"num_classes": spec.pop("num_classes", 10), "channels": spec.pop("channels", 3)}
    init = None if source is None else {"kind": "select", "source": source}
    return build_student(
        student_options(model=model, init=init, **({"patch_size": 4} | spec)),
        resolution=resolution, mean=(0.4,) * options["channels"], std=(0.2,) * options["channels"], seed=0, **options,
    )  # fmt: skip


def element(source: torch.Tensor, target: torch.Tensor, index: tuple[int, ...], groups: int = 1) -> float:
    """Of the source, what belongs at this index of the target: every (S / s)-th along each dimension."""
    there = [
        position * large // small for position, small, large in zip(index, target.shape, source.shape, strict=True)
    ]
    small, large = target.shape[0] // groups, source.shape[0] // groups
    there[0] = index[0] // small * large + index[0] % small * large // small
    return float(source.detach()[tuple(there)])


def check_selected(source: torch.Tensor, target: torch.Tensor, groups: int = 1) -> None:
    numbers = torch.Generator().manual_seed(0)
    for _ in range(300):
        index = tuple(int(torch.randint(size, (1,), generator=numbers)) for size in target.shape)
        assert float(target[index]) == element(source, target, index, groups), index


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Random weights in a file where timm would download some."""

    def make(name: str) -> Any:
        torch.manual_seed(7)
        source = timm.create_model(name.partition(".")[0])
        torch.nn.init.normal_(source.cls_token)
        for block in source.blocks:
            torch.nn.init.normal_(block.attn.qkv.bias)
        save_file(source.state_dict(), tmp_path / "downloaded.safetensors")
        config = _registry._model_pretrained_cfgs[name]
        local = dataclasses.replace(config, file=str(tmp_path / "downloaded.safetensors"), custom_load=False)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, local)
        return source

    return make


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Student, str]]:
    """An exported student; its check in a fresh process is the export's own test's affair."""
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)

    def export(**spec: Any) -> tuple[Student, str]:
        student = build(**spec)
        write_export(student, tmp_path / "earlier", class_names=[str(i) for i in range(10)], metadata={}, readme="")
        return student, str(tmp_path / "earlier")

    return export


@pytest.mark.parametrize("attention", [{"kind": "standard"}, {"kind": "refiner", "blocks": [0, 1], "share": True}])
def test_evenly_spaced_elements_of_timms_weights(download: Callable[[str], Any], attention: dict[str, Any]) -> None:
    source = download(TINY)
    student, plain = build(TINY, attention=attention), build(attention=attention)
    theirs, own, random = source.state_dict(), student.model.state_dict(), plain.model.state_dict()
    adapted = timm.create_model(TINY, pretrained=True, img_size=32, patch_size=4).state_dict()
    of_blocks = ("5.mlp.fc1.weight", "5.mlp.fc2.weight", "2.norm1.bias", "0.attn.proj.weight", "3.attn.proj.bias")
    for name in ("norm.weight", "cls_token", *(f"blocks.{each}" for each in of_blocks)):
        check_selected(theirs[name], own[name])
    for name in ("blocks.0.attn.qkv.weight", "blocks.5.attn.qkv.weight", "blocks.5.attn.qkv.bias"):
        check_selected(theirs[name], own[name], groups=3)
    if attention["kind"] == "refiner":  # the second block has no queries and keys
        check_selected(theirs["blocks.1.attn.qkv.weight"][2 * 192 :], own["blocks.1.attn.qkv.weight"])
    check_selected(adapted["patch_embed.proj.weight"], own["patch_embed.proj.weight"])
    positions = adapted["pos_embed"]
    check_selected(torch.cat([positions[:, :1], positions], dim=1), own["pos_embed"])
    assert torch.equal(own["dist_token"], own["cls_token"])
    untouched = [name for name in own if torch.equal(own[name], random[name])]
    assert {name for name in untouched if name.startswith("head")} == {
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"
    }  # fmt: skip
    assert student.adapter.contract.mean == (0.5,) * 3


def test_a_source_with_a_distillation_token_for_a_student_without(download: Callable[[str], Any]) -> None:
    source = download(DEIT)
    student = build(DEIT, patch_size=16, resolution=224, distillation_token=False, num_classes=1000)
    own = student.model.state_dict()
    check_selected(source.pos_embed[:, [0, *range(2, 198)]], own["pos_embed"])
    check_selected(source.head.weight, own["head.weight"])
    grey = build(DEIT, channels=1)
    assert grey.adapter.contract.mean == (0.4,)
    check_selected(source.dist_token, grey.model.state_dict()["dist_token"])


def test_a_conv_stem_is_not_a_patch_stem(download: Callable[[str], Any]) -> None:
    source = download(TINY)
    student, plain = build(TINY, stem="conv"), build(stem="conv")
    own, random = student.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(own[name], random[name]) for name in own if name.startswith("patch_embed."))
    check_selected(source.norm.weight, own["norm.weight"])
    assert student.adapter.contract.mean == (0.4,) * 3


def test_an_export_of_this_project_is_a_source(exported: Callable[..., tuple[Student, str]]) -> None:
    first, folder = exported(model="vit_micro", attention=AREA | {"key_mode": "sum"}, stem="conv")
    student = build(folder, attention=AREA, stem="conv", resolution=64)
    theirs, own = first.model.state_dict(), student.model.state_dict()
    assert own["pos_embed"].shape == (1, 2 + 256, 96)
    for name in ("head.weight", "head_dist.bias", "patch_embed.proj.0.0.weight", "patch_embed.proj.0.1.weight"):
        check_selected(theirs[name], own[name])
    check_selected(theirs["blocks.1.attn.qkv.weight"], own["blocks.1.attn.qkv.weight"], groups=3)
    again = build(folder, attention=AREA, stem="conv", resolution=64).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())
    with pytest.raises(InputError, match=r"student\.init\.source: .*earlier is smaller than the student: width 128 "):
        build(folder, model="vit_tiny")
    with pytest.raises(InputError, match=r"takes images of 3 channels, the data have 1"):
        build(folder, channels=1)


def test_a_selected_student_is_exported_as_ever(exported: Callable[..., tuple[Student, str]], tmp_path: Path) -> None:
    _, folder = exported(model="vit_micro")
    Path(folder).rename(tmp_path / "micro")
    student, folder = exported(source=f"{tmp_path}/micro")
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(student.adapter(images)), student.eval()(images).fused)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing_of_the_kind", "timm has no weights called 'nothing_of_the_kind'"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k is no ViT with a class token"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "is no ViT with a class token"),
        ("no/such/export", r"no/such/export/config\.json: no such file"),
    ],
)
def test_sources_that_cannot_be(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(source)


def test_another_kind_of_vit_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def stored(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained and name.startswith("vit"):
            raise ConnectionError("no network")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", stored)
    with pytest.raises(
        InputError, match=r"^student\.init\.source: timm's weights vit_tiny.* cannot be downloaded \(no"
    ):
        build(TINY)
    with pytest.raises(InputError, match=r"deit3_small.*another kind of ViT: it also has blocks\.0\.ls1\.gamma"):
        build("deit3_small_patch16_224.fb_in1k")
