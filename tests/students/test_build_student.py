"""From a recipe's student section to a model: heads, contracts, seeds, weights, and what cannot be built."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry
from torch import nn

from distill.errors import InputError
from distill.exports.folder import write_export
from distill.features import mean_over_heads
from distill.students import build_student
from distill.students.attention.area import AreaAttention
from tests.students.helpers import student_options

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
AREA = {"kind": "area", "max_area": [2, 2], "blocks": [0, 1]}


def build(model="vit_nano", *, resolution=32, num_classes=10, channels=3, mean=MEAN, std=STD, seed=0, **spec):
    if model.startswith("vit_n"):
        spec = {"patch_size": 4, **spec}
    return build_student(
        student_options(model=model, **spec),
        resolution=resolution, num_classes=num_classes, channels=channels, mean=mean, std=std, seed=seed,
    )  # fmt: skip


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model", "resolution"),
    [
        ("vit_nano", 32),
        ("levit_128s", 64),
        ("efficientformer_l1", 224),
        ("pit_ti_distilled_224", 64),
        ("repvit_m0_9", 32),
        ("focal_nano", 32),
        ("regionvit_nano", 32),
        ("lg_nano", 32),
    ],
)
def test_two_heads_in_training_and_in_evaluation(model, resolution):
    student = build(model, resolution=resolution)
    batch = images(2, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.eval()
    evaluated = student(batch)
    assert tuple(evaluated.logits) == student.heads == ("cls", "dist")
    cls, dist = evaluated.logits.values()
    torch.testing.assert_close(evaluated.fused, (cls + dist) / 2)
    assert not torch.equal(cls, dist)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items()), (
        "eval moved a statistic"
    )
    for module in student.modules():
        if isinstance(module, nn.Dropout | nn.BatchNorm2d):
            assert not module.training
    student.model.eval()
    torch.testing.assert_close(student.model(student.adapter(batch)), evaluated.fused)
    assert tuple(student.train()(batch).logits) == ("cls", "dist")
    assert torch.equal(student.eval()(batch).fused, mean_over_heads(student.logits(batch)))


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224", "cifar_resnet20"])
def test_one_head_of_any_timm_model(model):
    student = build(model)
    for mode in (True, False):
        features = student.train(mode)(images(2, 3, 32, 32))
        assert tuple(features.logits) == student.heads == ("cls",)
        assert student.training == mode
        assert features.fused is features.logits["cls"]
        assert features.fused.shape == (2, 10)


def test_no_distillation_token_is_one_head():
    assert build(distillation_token=False).heads == ("cls",)


def test_images_are_normalised_and_resized_by_the_contract():
    student = build().eval()
    batch = images(2, 3, 32, 32)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    student.model.eval()
    torch.testing.assert_close(student.model((batch - mean) / std), student.eval()(batch).fused)
    assert student(images(2, 3, 50, 20)).fused.shape == (2, 10)
    assert student.adapter.contract.size == 32


def test_greyscale_and_more_channels():
    assert build(channels=1, mean=(0.5,), std=(0.3,))(images(2, 1, 28, 28)).fused.shape == (2, 10)
    assert build("resnet18", channels=5, mean=(0.5,) * 5, std=(0.3,) * 5)(images(2, 5, 32, 32)).fused.shape == (2, 10)


def test_weights_depend_on_the_seed_only_and_the_random_state_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(attention=AREA).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = build(attention=AREA).state_dict(), build(attention=AREA, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.blocks.0.attn.qkv.weight"], other["model.blocks.0.attn.qkv.weight"])
    plain = build().state_dict()
    assert torch.equal(first["model.blocks.0.attn.qkv.weight"], plain["model.blocks.0.attn.qkv.weight"])


def test_drop_path_reaches_models_that_have_it():
    def rates(student):
        return [module.drop_prob for module in student.modules() if type(module).__name__ == "DropPath"]

    assert max(rates(build(drop_path=0.2))) == pytest.approx(0.2)
    assert max(rates(build("resnet18", drop_path=0.2))) > 0
    assert max(rates(build("vit_tiny_patch16_224", drop_path=0.2))) == pytest.approx(0.2)
    with pytest.raises(InputError, match=r"student\.drop_path.*cifar_resnet20 has no stochastic depth"):
        build("cifar_resnet20", drop_path=0.2)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match=r"student\.model.*'resnet81'.*resnet18"):
        build("resnet81")
    with pytest.raises(InputError, match=r"resnet18 has no weights 'mine'.*resnet18\.a1_in1k"):
        build("resnet18.mine")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Random weights in a file where timm would download DeiT's."""

    def make(name):
        architecture, _, tag = name.partition(".")
        torch.manual_seed(7)
        source = timm.create_model(architecture)
        save_file(source.state_dict(), tmp_path / f"{name}.safetensors")
        config = _registry._model_pretrained_cfgs[name]
        local = dataclasses.replace(config, file=str(tmp_path / f"{name}.safetensors"), custom_load=False)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, local)
        assert tag
        return source

    return make


@pytest.mark.parametrize("attention", [{"kind": "standard"}, AREA, AREA | {"key_mode": "sum"}], ids=str)
def test_pretrained_starts_from_timms_weights_for_the_size(stand_in, attention):
    source = stand_in("deit_tiny_distilled_patch16_224.fb_in1k")
    student = build("vit_tiny", pretrained=True, attention=attention, patch_size=8, resolution=48)
    for name in ("blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "norm.weight", "dist_token"):
        assert torch.equal(student.model.state_dict()[name], source.state_dict()[name])
    assert student.model.pos_embed.shape == (1, 2 + 36, 192)
    assert torch.equal(student.model.pos_embed[:, :2], source.pos_embed[:, :2])
    assert student.model.patch_embed.proj.weight.shape == (192, 3, 8, 8)
    assert student.model.head.weight.shape == (10, 192)
    assert student.adapter.contract.mean == (0.485, 0.456, 0.406)
    assert student.heads == ("cls", "dist")
    grey = build("vit_tiny", pretrained=True, attention=attention, channels=1, mean=(0.5,), std=(0.5,))
    assert grey(images(1, 1, 28, 28)).fused.shape == (1, 10)


def test_at_the_source_size_pretrained_is_the_source(stand_in):
    source = stand_in("deit_tiny_distilled_patch16_224.fb_in1k").eval()
    student = build("vit_tiny", pretrained=True, resolution=224, num_classes=1000).eval()
    batch = images(1, 3, 224, 224)
    torch.testing.assert_close(student(batch).fused, source(student.adapter(batch)))


def test_a_missing_distillation_token_starts_as_the_class_token(monkeypatch):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    source.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr("distill.students.weights.create_pretrained", lambda name, **kwargs: source)
    monkeypatch.setattr("distill.students.weights.TIMM_WEIGHTS", {("vit_tiny", True): "a plain one"})
    student = build("vit_tiny", pretrained=True)
    assert torch.equal(student.model.dist_token, source.cls_token)
    assert torch.equal(student.model.pos_embed[:, 2:], source.pos_embed[:, 1:])
    assert torch.equal(student.model.pos_embed[:, 0], student.model.pos_embed[:, 1])
    assert student.adapter.contract.mean == (0.5,) * 3


def test_every_named_source_of_weights_exists_in_timm():
    from distill.students.weights import TIMM_WEIGHTS

    assert set(TIMM_WEIGHTS.values()) <= set(timm.list_pretrained())


def test_pretrained_where_there_is_nothing(stand_in):
    with pytest.raises(InputError, match="no weights for vit_nano; it has them for vit_tiny, vit_small"):
        build(pretrained=True)
    with pytest.raises(InputError, match="patch stem"):
        build("vit_tiny", pretrained=True, stem="conv")
    with pytest.raises(InputError, match="no weights for cifar_resnet20"):
        build("cifar_resnet20", pretrained=True)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise ConnectionError("no network")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"deit_tiny_distilled_patch16_224.*no network"):
        build("vit_tiny", pretrained=True)


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """An exported student; its check in a fresh process is the export's own test's affair."""
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)

    def export(**spec):
        student = build(**spec)
        write_export(student, tmp_path / "earlier", class_names=[str(i) for i in range(10)], metadata={}, readme="")
        return student, str(tmp_path / "earlier")

    return export


def test_an_earlier_export_is_a_start(earlier):
    first, folder = earlier(attention=AREA, seed=3)
    second = build(attention=AREA, weights=folder, mean=(0.1,) * 3)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert second.adapter.contract.mean == MEAN
    larger = build(attention=AREA, weights=folder, resolution=64)
    assert larger.model.pos_embed.shape == (1, 2 + 256, 96)
    assert larger(images(1, 3, 32, 32)).fused.shape == (1, 10)
    more_classes = build(attention=AREA, weights=folder, num_classes=20)
    assert more_classes.model.head_dist.weight.shape == (20, 96)
    assert torch.equal(more_classes.model.norm.weight, first.model.norm.weight)


def test_an_export_of_another_student_is_refused_with_its_keys(earlier):
    _, folder = earlier()
    with pytest.raises(InputError, match=r"missing: .*attn\.height_embedding"):
        build(attention=AREA | {"key_mode": "sum"}, weights=folder)
    with pytest.raises(InputError, match="unknown: dist_token, head_dist"):
        build(distillation_token=False, weights=folder)
    with pytest.raises(InputError, match="of another shape: blocks"):
        build("vit_micro", patch_size=4, weights=folder)
    with pytest.raises(InputError, match=r"missing: .*unknown: "):
        build("resnet18", weights=folder)
    with pytest.raises(InputError, match=r"nowhere/config\.json: no such file"):
        build(weights="nowhere")


def test_config_describes_the_model_to_timm():
    student = build(attention=AREA)
    config = student.timm_config([f"class {index}" for index in range(10)])
    read = json.loads(json.dumps(config))
    read["preparation"]["background"] = tuple(read["preparation"]["background"])  # JSON has lists only
    assert read == config
    assert config["architecture"] == "area_vit_nano"
    assert config["model_args"]["attention"]["max_area"] == [2, 2]
    assert config["label_names"][3] == "class 3"
    assert config["num_features"] == 96
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ([3, 32, 32], list(MEAN), list(STD))
    assert tuple(cfg["classifier"]) == ("head", "head_dist")
    assert isinstance(student.model.blocks[1].attn, AreaAttention)
    assert (
        build("vit_small", resolution=64).timm_config(["a"] * 10)["architecture"] == "deit_small_distilled_patch16_224"
    )


def test_a_model_that_cannot_take_the_resolution_is_refused():
    with pytest.raises(
        InputError, match=r"student\.model: inception_v3 cannot take images of 32 px .*data\.resolution"
    ):
        build("inception_v3", resolution=32)
