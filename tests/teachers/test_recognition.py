"""Weights files are recognised by the names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from distill.errors import InputError
from distill.recipe.installed import timm_models
from teachers.recognition import Recognised, recognise
from teachers.signatures import classes_of, empty_network, known_signatures, possible_signatures

CLASSES = 7


def network(name: str, classes: int = CLASSES, **arguments: Any) -> torch.nn.Module:
    library, _, rest = name.rpartition("/")
    built = torchvision.models.get_model(rest, num_classes=classes) if library else None
    return built or timm.create_model(name, num_classes=classes, **arguments)


def recognised(folder: Path, content: Any) -> Recognised:
    torch.save(content, folder / "w.pth")
    return recognise(folder / "w.pth")


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet20", "resnet10t", "mobilenetv3_small_050", "regnetx_002", "convnext_atto", "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1", "torchvision/mobilenet_v3_small",
        "torchvision/shufflenet_v2_x0_5",
    ],
)  # fmt: skip
def test_architectures_of_each_library(name: str, tmp_path: Path) -> None:
    found = recognised(tmp_path, network(name).state_dict())
    assert name in (found.model, *found.alike)
    assert (found.num_classes, found.channels) == (CLASSES, 3)
    again = network(found.model)
    again.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "net.encoder."])
@pytest.mark.parametrize("wrapping", ["state_dict", "model"])
def test_renamed_and_nested(prefix: str, wrapping: str, tmp_path: Path) -> None:
    weights = {prefix + key: value for key, value in network("cifar_resnet20").state_dict().items()}
    assert recognised(tmp_path, {wrapping: weights, "epoch": 3}) == Recognised("cifar_resnet20", CLASSES, 3, ())


def test_other_forms_of_weights(tmp_path: Path) -> None:
    weights = network("cifar_resnet20").state_dict()
    save_file(weights, tmp_path / "w.safetensors")  # by name, not in the network's order
    assert recognise(tmp_path / "w.safetensors").model == "cifar_resnet20"
    old = {key: value.half() for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert recognised(tmp_path, old).model == "cifar_resnet20"
    headless = {key: value for key, value in weights.items() if not key.startswith("linear")}
    assert recognised(tmp_path, headless) == Recognised("cifar_resnet20", 0, 3, ())
    grey = network("resnet10t", in_chans=1).state_dict()
    assert recognised(tmp_path, grey) == Recognised("resnet10t", CLASSES, 1, ())


def test_the_same_tensors_in_several_architectures(tmp_path: Path) -> None:
    found = recognised(tmp_path, network("torchvision/resnet18").state_dict())
    assert found == Recognised("resnet18", CLASSES, 3, ("resnetblur18",))


def test_what_fits_nothing_is_compared_with_the_nearest(tmp_path: Path) -> None:
    weights = network("cifar_resnet20").state_dict()
    weights["layer2.0.conv1.weight"] = torch.zeros(32, 16, 5, 5)
    weights["extra.bias"] = torch.zeros(3)
    with pytest.raises(InputError) as caught:
        recognised(tmp_path, weights)
    message = str(caught.value)
    assert "nearest is 'cifar_resnet20'" in message
    assert "1 surplus: extra.bias" in message
    assert "layer2.0.conv1.weight [32, 16, 5, 5] instead of [32, 16, 3, 3]" in message
    with pytest.raises(InputError, match=r"fits none of 1,\d+ architectures.*its keys are a\.b, a\.c"):
        recognised(tmp_path, {"a.b": torch.zeros(3, 4), "a.c": torch.zeros(3)})


def test_signatures_are_those_of_the_installed_libraries() -> None:
    known = known_signatures()
    others = torchvision.models.list_models(torchvision.models)
    names = {*timm_models(), *(f"torchvision/{name}" for name in others)}
    assert len(known.keys() & names) > 1400
    assert len(names - known.keys()) < 20, "run python -m teachers.signatures"
    for name in sorted(known.keys() & names)[::150]:
        built = empty_network(name)
        shapes = {key: value.shape for key, value in built.state_dict().items()}
        assert known[name] in possible_signatures(shapes)
        assert next(built.parameters()).is_meta
        assert classes_of(built) >= 0


@pytest.mark.shared
@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
def test_public_weights(file: str, teacher_weights: Path) -> None:
    name = f"cifar_{file.partition('-')[0]}"
    assert recognise(teacher_weights / file) == Recognised(name, 10, 3, ())
