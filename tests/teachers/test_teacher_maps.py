"""Feature maps of teachers, beside what forward hooks see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from distill.errors import InputError
from distill.inputs import InputContract
from teachers import Ensemble, Teacher
from teachers.cifar_resnet import CifarResNet

AS_THEY_COME = InputContract((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), None)


def network_of(name: str) -> nn.Module:
    """With weights and statistics that are all different."""
    if name.startswith("torchvision/"):
        with torch.device("meta"):
            network = torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=5)
            if name == "torchvision/vgg11":
                network.classifier = nn.Linear(512 * 7 * 7, 5)  # of 120 million weights
        network.to_empty(device="cpu")
    else:
        network = timm.create_model(name, num_classes=5)
    generator = torch.Generator().manual_seed(0)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
        elif value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        else:
            value.uniform_(0.5, 1.5, generator=generator)
    return network


def teacher_of(name: str, contract: InputContract = AS_THEY_COME) -> Teacher:
    return Teacher(name, network_of(name), contract, 5)


def images_of(side: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(5))


def seen_by_hooks(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    """What comes out of these modules; copied, for what follows may work in place."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, arguments, output: found.__setitem__(name, output.clone())

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    return found


SHAPES: dict[tuple[str, int], dict[str, tuple[int, int, int]]] = {
    ("cifar_resnet20", 32): {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)},
    ("cifar_resnet32", 8): {"layer1": (16, 8, 8), "layer2": (32, 4, 4), "layer3": (64, 2, 2)},
    ("resnet18", 32): {
        "act1": (64, 16, 16), "layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2), "layer4": (512, 1, 1)
    },
    ("resnet18", 64): {
        "act1": (64, 32, 32), "layer1": (64, 16, 16), "layer2": (128, 8, 8), "layer3": (256, 4, 4),
        "layer4": (512, 2, 2),
    },
    ("convnext_atto", 64): {
        "stages.0": (40, 16, 16), "stages.1": (80, 8, 8), "stages.2": (160, 4, 4), "stages.3": (320, 2, 2)
    },
    ("efficientnet_b0", 64): {
        "blocks.0": (16, 32, 32), "blocks.1": (24, 16, 16), "blocks.2": (40, 8, 8), "blocks.4": (112, 4, 4),
        "blocks.6": (320, 2, 2),
    },
    ("torchvision/resnet18", 64): {
        "relu": (64, 32, 32), "layer1": (64, 16, 16), "layer2": (128, 8, 8), "layer3": (256, 4, 4),
        "layer4": (512, 2, 2),
    },
    # Without `avgpool`, which makes 7x7 of 2x2.
    ("torchvision/vgg11", 64): {
        "features.1": (64, 64, 64), "features.4": (128, 32, 32), "features.9": (256, 16, 16),
        "features.14": (512, 8, 8), "features.19": (512, 4, 4), "features": (512, 2, 2),
    },
    ("torchvision/mobilenet_v3_small", 64): {
        "features.0": (16, 32, 32), "features.1": (16, 16, 16), "features.3": (24, 8, 8), "features.8": (48, 4, 4),
        "features": (576, 2, 2),
    },
    ("torchvision/efficientnet_b0", 64): {
        "features.1": (16, 32, 32), "features.2": (24, 16, 16), "features.3": (40, 8, 8), "features.5": (112, 4, 4),
        "features": (1280, 2, 2),
    },
    # What follows `features` works in place.
    ("torchvision/densenet121", 64): {
        "features.relu0": (64, 32, 32), "features.denseblock1": (256, 16, 16), "features.denseblock2": (512, 8, 8),
        "features.denseblock3": (1024, 4, 4), "features": (1024, 2, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "side"), SHAPES, ids=lambda value: str(value))
def test_maps_are_those_of_the_modules_beside_the_logits(name: str, side: int) -> None:
    teacher, images = teacher_of(name), images_of(side)
    plain = teacher(images)
    assert plain.std(0).max() > 0, "the images must differ for this test to mean something"
    expected = SHAPES[name, side]
    shapes = teacher.map_shapes(side)
    assert list(shapes.items()) == list(expected.items()), "from the first to the last"
    names = tuple(shapes)
    teacher.prepare_maps(names, side)
    logits, maps = teacher(images, names)
    assert torch.equal(logits, plain)
    assert list(maps) == list(names)
    found = seen_by_hooks(teacher.network, names, teacher.adapter(images))
    for key in names:
        assert maps[key].shape == (2, *expected[key])
        assert torch.equal(maps[key], found[key]), key
        assert maps[key].std() > 0, key
    assert not any(module.training for module in teacher.modules())
    # Some of them, whatever their order.
    some = (names[-1], names[0])
    some_maps = teacher.features(images, some)
    assert some_maps.keys() == set(some)
    assert all(torch.equal(some_maps[key], maps[key]) for key in some)
    assert teacher.map_shapes(side, some) == {key: expected[key] for key in some}


def test_no_gradient_and_no_trace_in_the_network() -> None:
    for name in ("cifar_resnet20", "torchvision/resnet18"):
        teacher, images = teacher_of(name), images_of(32).requires_grad_()
        state = {key: value.clone() for key, value in teacher.state_dict().items()}
        names = tuple(teacher.map_shapes(32))
        logits, maps = teacher(images, names)
        assert not logits.requires_grad
        assert not any(found.requires_grad for found in maps.values())
        assert teacher.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
        assert len([*teacher.children()]) == 2, "what reads the maps is no part of the teacher"


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "torchvision/resnet18"])
def test_one_forward_pass_for_logits_and_maps(name: str) -> None:
    teacher, images = teacher_of(name), images_of(32)
    names = tuple(teacher.map_shapes(32))
    calls: list[int] = []
    for module in teacher.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    teacher(images)
    plain = len(calls)
    assert plain > 10
    calls.clear()
    teacher(images, names)
    assert len(calls) == plain


def test_maps_are_read_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("cifar_resnet20")
    monkeypatch.setattr(CifarResNet, "forward_intermediates", None)
    assert teacher(images_of(8)).shape == (2, 5)
    teacher.prepare_maps((), 8)
    assert teacher._readers == {}


def test_nodes_of_torchvisions_graphs_by_name() -> None:
    """Modules within modules, what an operation in place follows, and what is no module at all."""
    teacher, images = teacher_of("torchvision/resnet18"), images_of(64)
    names = ["layer2.0.conv1", "layer2.0.bn1", "layer1.0.add", "layer4", "layer4.1", "layer4.1.add"]
    maps = teacher.features(images, names)
    modules = ["layer2.0.conv1", "layer2.0.bn1", "layer4", "maxpool", "layer1.0.bn2", "layer4.1.bn2", "layer4.0"]
    found = seen_by_hooks(teacher.network, modules, teacher.adapter(images))
    for name in ("layer2.0.conv1", "layer2.0.bn1", "layer4"):
        assert torch.equal(maps[name], found[name]), name
    assert maps["layer2.0.bn1"].min() < 0, "not yet rectified"
    assert torch.equal(maps["layer1.0.add"], found["layer1.0.bn2"] + found["maxpool"])
    assert torch.equal(maps["layer4.1"], maps["layer4"]), "its last module"
    assert torch.equal(maps["layer4.1.add"], found["layer4.1.bn2"] + found["layer4.0"])
    assert teacher.map_shapes(64, ["layer2.0.conv1"]) == {"layer2.0.conv1": (128, 8, 8)}


@pytest.mark.parametrize(
    ("name", "asked", "known"),
    [
        ("cifar_resnet20", ["layer4"], "layer1, layer2, layer3"),
        ("cifar_resnet20", ["layer1", "layer1.0"], "layer1, layer2, layer3"),
        ("resnet18", ["layer2", "layer22"], "act1, layer1, layer2, layer3, layer4"),
        ("torchvision/resnet18", ["layer5"], "relu, layer1, layer2, layer3"),
        ("torchvision/resnet18", ["layer"], "relu, layer1, layer2, layer3"),
        ("torchvision/resnet18", ["layer1", "flatten"], "relu, layer1, layer2, layer3"),
        ("torchvision/resnet18", ["fc"], "relu, layer1, layer2, layer3"),
    ],
)
def test_other_names_are_refused_with_those_that_there_are(name: str, asked: list[str], known: str) -> None:
    """And outputs that are no maps, [B, C, h, w]."""
    teacher = teacher_of(name)
    for ask in (lambda: teacher.features(images_of(32), asked), lambda: teacher.map_shapes(32, asked)):
        with pytest.raises(InputError) as refused:
            ask()
        assert str(refused.value) == f"teacher {name}: no feature map '{asked[-1]}'; it has {known}."


class Moody(nn.Module):
    """What it does depends on the values: no graph of it can be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.head((maps if maps.sum() > 0 else -maps).mean((2, 3)))


def test_networks_whose_maps_cannot_be_read() -> None:
    moody = Teacher("moody", Moody(), AS_THEY_COME, 5)
    assert moody(images_of(8)).shape == (2, 5)
    with pytest.raises(InputError, match=r"teacher moody: its feature maps cannot be read \(.+\)\. Take a timm model"):
        moody.map_shapes(8)
    flat = Teacher("flat", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)), AS_THEY_COME, 5)
    with pytest.raises(InputError, match="teacher flat: has no feature maps"):
        flat.map_shapes(8)
    with pytest.raises(InputError, match="teacher flat: no feature map '3'; it has none"):
        flat.map_shapes(8, ["3"])


def test_an_ensemble_has_no_maps() -> None:
    both = Ensemble([teacher_of("cifar_resnet20"), teacher_of("cifar_resnet32")], [1.0, 1.0])
    for ask in (
        lambda: both.map_shapes(8),
        lambda: both.map_shapes(8, ["layer1"]),
        lambda: both.features(images_of(8), ["layer1"]),
        lambda: both.prepare_maps(["layer1"], 8),
    ):
        with pytest.raises(InputError, match=r"an ensemble has no feature maps of its own; name a single teacher"):
            ask()
    both.prepare_maps((), 8)


@pytest.mark.parametrize("name", ["cifar_resnet20", "torchvision/resnet18", "convnext_atto"])
def test_maps_in_half_precision(name: str) -> None:
    teacher, images = teacher_of(name), images_of(32, batch=4)
    names = tuple(teacher.map_shapes(32))
    copied = teacher.with_weights_in(torch.bfloat16)
    assert copied._readers == {}, "those of the teacher would read the teacher"
    copied.prepare_maps(names, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, maps = copied(images, names)
        expected, in_bf16 = teacher(images, names)
        assert torch.equal(logits, copied(images))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    _, exact = teacher(images, names)
    for key in names:
        assert torch.equal(maps[key], in_bf16[key]), key
        error = (maps[key].float() - exact[key]).abs().mean() / exact[key].abs().mean()
        assert 0 < error < 0.1, key


def test_images_of_another_size_or_of_one_channel() -> None:
    teacher = teacher_of("cifar_resnet20", InputContract((0.5,) * 3, (0.25,) * 3, 16))
    assert teacher.map_shapes(8) == teacher.map_shapes(16)
    grey = images_of(8, channels=1)
    maps = teacher.features(grey, ["layer3"])
    assert maps["layer3"].shape == (2, 64, 4, 4)
    assert torch.equal(maps["layer3"], teacher.features(grey.expand(-1, 3, -1, -1), ["layer3"])["layer3"])


# The CIFAR ResNets' own forward_intermediates


@pytest.mark.parametrize(
    ("indices", "places"),
    [
        (None, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ([2], [2]), ([0, 2], [0, 2]),
        ([2, 0], [0, 2]), ((1,), [1]), ([-1], [2]), ([-3, 1], [0, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_indices_are_timms(indices: Any, places: list[int]) -> None:
    """The last n for a number, all for None; from the first to the last whatever the order of a list."""
    network = network_of("cifar_resnet20").eval()
    stages = list(seen_by_hooks(network, ["layer1", "layer2", "layer3"], images_of(8)).values())
    with torch.no_grad():
        final, maps = network.forward_intermediates(images_of(8), indices=indices)
        only = network.forward_intermediates(images_of(8), indices=indices, intermediates_only=True)
        assert torch.equal(network.forward_head(final), network(images_of(8)))
    for found in (maps, only):
        assert isinstance(found, list)
        assert len(found) == len(places)
        assert all(torch.equal(one, stages[place]) for one, place in zip(found, places, strict=True))
    # So says timm's own network, of five stages.
    theirs = timm.create_model("test_resnet").eval()
    negative = isinstance(indices, (list, tuple)) and min(indices) < 0
    expected = [place + (2 if isinstance(indices, int) or negative else 0) for place in places]
    if indices is not None and not (negative and max(indices) > 0):
        with torch.no_grad():
            _, all_of_them = theirs.forward_intermediates(images_of(32))
            _, some = theirs.forward_intermediates(images_of(32), indices=indices)
        assert all(torch.equal(one, all_of_them[place]) for one, place in zip(some, expected, strict=True))


@pytest.mark.parametrize("indices", [0, 4, [3], [-4]], ids=str)
def test_indices_that_there_are_not(indices: Any) -> None:
    with pytest.raises(AssertionError, match="out of range"):
        CifarResNet(20).forward_intermediates(images_of(8), indices=indices)


def test_maps_as_timm_may_ask_for_them() -> None:
    network = CifarResNet(20).eval()
    options = {"norm": False, "stop_early": True, "output_fmt": "NCHW"}
    maps = network.forward_intermediates(images_of(8), indices=[0, 1], intermediates_only=True, **options)
    assert [tuple(found.shape) for found in maps] == [(2, 16, 8, 8), (2, 32, 4, 4)]
    with pytest.raises(AssertionError):
        network.forward_intermediates(images_of(8), output_fmt="NLC")
