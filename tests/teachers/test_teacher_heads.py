"""Teachers whose classifier is missing, or of other classes than the data's: files, folders and libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import teachers.sources
from distill.errors import InputError
from teachers import Teacher, load_teacher
from teachers.heads import take_off_classifier

HEADLESS = "convnextv2_atto.fcmae"
"""A model of timm's whose weights have no classifier, small enough to be built often."""


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(network: nn.Module, path: Path, **more: Tensor) -> dict[str, str]:
    torch.save({**network.state_dict(), **more}, path)
    return {"weights": str(path)}


def built(name: str, num_classes: int) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes)


def same_features(teacher: Teacher, network: Any) -> None:
    network = network.eval()
    assert take_off_classifier(network)
    expected = network(teacher.adapter(images())).detach()
    assert teacher.num_classes == 0
    torch.testing.assert_close(teacher(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", ["no head", "another head", "another name", "a prefix"])
def test_a_file_for_weights_without_a_classifier(tmp_path: Path, keys: str) -> None:
    """Its head, if it has one, is left out: that of other classes too, whatever methods there are."""
    network = built(HEADLESS, 0 if keys in ("no head", "another name") else 7)
    weights = network.state_dict()
    if keys == "another name":
        weights |= {"head.fc.weight": torch.zeros(7, 320), "head.fc.bias": torch.zeros(7)}
    if keys == "a prefix":
        weights = {f"backbone.{key}": value for key, value in weights.items()}
    torch.save(weights, tmp_path / "w.pth")
    spec = {"model": HEADLESS, "weights": str(tmp_path / "w.pth"), "size": 32}
    teacher = load_teacher(spec, 5, any_classifier=True)
    same_features(teacher, network)
    assert [shape[1] for shape in teacher.map_shapes(32).values()] == [8, 4, 2, 1]


LIBRARIES: dict[str, Callable[[int], Any]] = {
    "cifar_resnet20": lambda classes: built("cifar_resnet20", classes),
    "resnet10t": lambda classes: built("resnet10t", classes),
    HEADLESS: lambda classes: built(HEADLESS, classes),
    "torchvision/resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "torchvision/mobilenet_v3_small": lambda classes: torchvision.models.mobilenet_v3_small(num_classes=classes),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_file_with_a_classifier_of_other_classes(tmp_path: Path, name: str) -> None:
    """Taken off for methods on maps, an error for others; that of as many classes stays in both cases."""
    network = LIBRARIES[name](7)
    spec = {"model": name, "size": 32, **saved(network, tmp_path / "w.pth")}
    with pytest.raises(InputError, match="They have 7 classes, the data have 5"):
        load_teacher(spec, 5)
    assert load_teacher(spec, 7, any_classifier=True).num_classes == 7
    same_features(load_teacher(spec, 5, any_classifier=True), network)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v3_small"])
def test_torchvisions_networks_without_a_head_in_the_file(tmp_path: Path, name: str) -> None:
    network = LIBRARIES[name](7)
    assert take_off_classifier(network)
    teacher = load_teacher({"model": name, "size": 32, **saved(network, tmp_path / "w.pth")}, 5)
    expected = network.eval()(teacher.adapter(images())).detach()
    torch.testing.assert_close(teacher(images()), expected, rtol=1e-4, atol=1e-5)
    assert teacher.map_shapes(32)


def folder(path: Path, classes: int, stated: int | None = None) -> Any:
    network = built(HEADLESS, classes)
    path.mkdir()
    config = {"architecture": HEADLESS.partition(".")[0], "num_classes": classes if stated is None else stated,
              "pretrained_cfg": {**network.pretrained_cfg, "license": "cc-by-nc-4.0"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, default=str))
    save_file(network.state_dict(), path / "model.safetensors")
    return network


def test_folders(tmp_path: Path) -> None:
    """Without a classifier, with one of other classes, and with one that its configuration does not know."""
    for index, (classes, stated) in enumerate(((0, None), (7, None), (7, 0))):
        network = folder(tmp_path / str(index), classes, stated)
        spec = {"model": f"local-dir:{tmp_path / str(index)}", "size": 32}
        same_features(load_teacher(spec, 5, any_classifier=True), network)
        if classes and stated is None:
            with pytest.raises(InputError, match="7 classes, the data have 5"):
                load_teacher(spec, 5)


def test_libraries_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's, the Hub's and torchvision's, as they are downloaded."""
    monkeypatch.setattr(teachers.sources, "_pretrained", lambda name, url: built("resnet10t", 1000))
    config = {**built("resnet10t", 1000).pretrained_cfg, "num_classes": 1000}
    monkeypatch.setattr(teachers.sources, "_hub_config", lambda name: config | {"license": "mit"})
    for model in ("resnet10t.c3_in1k", "hf_hub:somebody/resnet10t"):
        spec = {"model": model, "size": 32}
        with pytest.raises(InputError, match="1000 classes, the data have 5"):
            load_teacher(spec, 5)
        same_features(load_teacher(spec, 5, any_classifier=True), built("resnet10t", 1000))
    assert load_teacher({"model": "hf_hub:somebody/resnet10t", "size": 32}, 1000).origins == (
        ("mit", "somebody/resnet10t"),
    )
    network = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: network)
    assert load_teacher({"model": "torchvision/resnet18", "size": 32}, 5, any_classifier=True).num_classes == 0


def test_a_classifier_that_cannot_be_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torchvision.models.squeezenet1_1()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: network)
    with pytest.raises(InputError, match="SqueezeNet has 1000 classes, and its classifier cannot be taken off"):
        load_teacher({"model": "torchvision/squeezenet1_1"}, 5, any_classifier=True)


@pytest.mark.parametrize("size", [40, 16])
def test_sizes_that_do_not_fit(tmp_path: Path, size: int) -> None:
    """No multiple of a patch, or smaller than the strides of a network."""
    name = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m" if size == 40 else HEADLESS
    spec = {"model": name, "size": size, **saved(built(name, 0), tmp_path / "w.pth")}
    with pytest.raises(InputError, match=r"cannot take its inputs.* Check teacher\.size"):
        load_teacher(spec, 5)
