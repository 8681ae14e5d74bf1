from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import teachers.sources
from distill import recipe
from distill.errors import InputError
from distill.files.digests import state_digest
from distill.inputs import InputContract
from distill.recipe import Teacher as Spec
from distill.students import build_student
from teachers import ZOO, Ensemble, Teacher, load_teacher
from teachers.contracts import timm_contract
from teachers.sources import untrained_source
from tests.students.helpers import student_options

IMAGENET = InputContract((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CIFAR ResNet-20 of five classes."""
    return _save(
        timm.create_model("cifar_resnet20", num_classes=5), tmp_path_factory.mktemp("weights") / "w.safetensors"
    )


def _save(network: nn.Module, path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.copy_(torch.rand(value.shape, generator=generator) - 0.5)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            fan_in = max(value[0].numel(), 1)
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
    save_file(network.state_dict(), path)
    return path


def _images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def _plain(spec: dict[str, Any], weights: Path, **kwargs: Any) -> nn.Module:
    """The network as timm builds it, without anything that a teacher adds."""
    network = timm.create_model(spec["model"], num_classes=5, **kwargs)
    timm.models.load_checkpoint(network, str(weights))
    return network.eval()


def test_logits_are_the_networks_under_its_contract(weights: Path) -> None:
    spec = {"model": "cifar_resnet20", "weights": str(weights)}
    teacher = load_teacher(spec, 5)
    images = _images(4, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    expected = _plain(spec, weights)((images - mean) / std).detach()
    assert expected.std(0).min() > 1e-2, "the network must tell images apart for this test to mean something"
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
    assert teacher.contract == IMAGENET
    assert (teacher.name, teacher.num_classes) == ("cifar_resnet20", 5)
    assert teacher.digest == state_digest(_plain(spec, weights).state_dict())


def test_recipe_keys_go_before_the_zoos(weights: Path) -> None:
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "size": 16, "interpolation": "bilinear"}
    spec = {"model": "cifar_resnet20", "weights": str(weights)}
    for key in own:
        teacher = load_teacher(spec | {key: own[key]}, 5)
        for field in own:
            expected = own[field] if field == key else getattr(IMAGENET, field)
            assert getattr(teacher.contract, field) == (tuple(expected) if isinstance(expected, list) else expected)
    text = load_teacher(recipe.Teacher(**spec, **own), 5).describe()
    assert "\n" not in text
    for part in (
        "cifar_resnet20",
        "0.27 M",
        "5 classes",
        "mean (0.5, 0.4, 0.3)",
        "std (0.1, 0.2, 0.3)",
        "16 px by bilinear",
    ):
        assert part in text


def test_frozen_whatever_the_trainer_does(weights: Path) -> None:
    teacher = load_teacher({"model": "cifar_resnet20", "weights": str(weights)}, 5)
    images = _images(4, 3, 32, 32).requires_grad_()
    before, state = teacher(images), {key: value.clone() for key, value in teacher.state_dict().items()}
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    after = teacher(images)
    assert not after.requires_grad
    assert torch.equal(before, after)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    student = torch.zeros(4, 5, requires_grad=True)  # its outputs may be targets in a graph with gradients
    nn.functional.kl_div(student.log_softmax(1), after.log_softmax(1), reduction="sum", log_target=True).backward()
    assert student.grad is not None


def test_float32_logits_under_autocast(weights: Path) -> None:
    teacher = load_teacher({"model": "cifar_resnet20", "weights": str(weights)}, 5)
    images = _images(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = teacher(images)
    assert low.dtype == torch.float32
    assert 0 < (low - teacher(images)).abs().max() < 1  # the inside did run in bf16


def test_other_sizes_and_grey_images_are_adapted(weights: Path) -> None:
    teacher = load_teacher({"model": "cifar_resnet20", "weights": str(weights)}, 5)
    grey = _images(2, 1, 8, 8)
    torch.testing.assert_close(teacher(grey), teacher(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(InputError, match=r"takes images of 3 channel\(s\), the data have 4"):
        teacher(_images(2, 4, 32, 32))


def test_a_teacher_of_grey_images(tmp_path: Path) -> None:
    path = _save(timm.create_model("cifar_resnet20", num_classes=5, in_chans=1), tmp_path / "grey.safetensors")
    teacher = load_teacher({"model": "cifar_resnet20", "weights": str(path), "mean": [0.5], "std": [0.5]}, 5)
    assert teacher(_images(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(InputError, match="1 and 3 channels; give equally many"):
        load_teacher({"model": "cifar_resnet20", "weights": str(path), "mean": [0.5]}, 5)


def test_timm_model_with_local_weights_takes_timms_contract(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"model": "resnet10t", "size": 64}
    path = _save(timm.create_model("resnet10t", num_classes=5), tmp_path / "w.safetensors")
    teacher = load_teacher(spec | {"weights": str(path)}, 5)
    config = timm.get_pretrained_cfg("resnet10t")
    assert teacher.contract == InputContract(config.mean, config.std, 64, config.interpolation)
    images = _images(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(
        teacher(images), _plain(spec, path)((images - mean) / std).detach(), rtol=1e-4, atol=1e-4
    )


def test_torchvision_model_with_local_weights(tmp_path: Path) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=5).eval()
    path = _save(network, tmp_path / "w.safetensors")
    teacher = load_teacher({"model": "torchvision/squeezenet1_1", "weights": str(path)}, 5)
    assert teacher.contract == InputContract(IMAGENET.mean, IMAGENET.std, 224, "bilinear")
    images = _images(2, 3, 224, 224)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(teacher(images), network((images - mean) / std).detach(), rtol=1e-4, atol=1e-4)


def test_pretrained_timm_weights_fill_every_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = timm.create_model("cifar_resnet20", num_classes=10)
    path = _save(network, tmp_path / "w.safetensors")
    config = timm.get_pretrained_cfg("cifar_resnet20")
    config.file = str(path)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "cifar_resnet20", config)
    monkeypatch.delitem(ZOO, "cifar_resnet20")
    teacher = load_teacher({"model": "cifar_resnet20"}, 10)
    assert teacher.digest == state_digest(network.state_dict())


def test_zoo_weights_come_through_the_hub_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = timm.create_model("cifar_resnet20", num_classes=10)
    path = _save(network, tmp_path / "w.safetensors")
    asked = []
    monkeypatch.setattr(teachers.sources, "download", lambda url, sha256: asked.append((url, sha256)) or path)
    assert load_teacher({"model": "cifar_resnet20"}, 10).digest == state_digest(network.state_dict())
    assert asked == [(ZOO["cifar_resnet20"].url, "12fca82f")]


def _folder(network: nn.Module, folder: Path, **config: Any) -> Path:
    save_for_hf(network, folder, safe_serialization=True, model_config=config or None)
    return folder


def test_timm_folder(tmp_path: Path) -> None:
    network = timm.create_model("cifar_resnet20", num_classes=5, in_chans=1).eval()
    network.pretrained_cfg |= {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.2,), "num_classes": 5}
    folder = _folder(network, tmp_path / "export")
    teacher = load_teacher({"model": f"local-dir:{folder}"}, 5)
    assert teacher.contract == InputContract((0.3,), (0.2,), 16)
    images = _images(2, 1, 16, 16)
    torch.testing.assert_close(teacher(images), network((images - 0.3) / 0.2).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="5 classes, the data have 7"):
        load_teacher({"model": f"local-dir:{folder}"}, 7)


def test_folder_of_a_model_with_two_heads_gives_their_mean(tmp_path: Path) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **args).eval()
    network.pretrained_cfg |= {"input_size": (3, 32, 32), "num_classes": 5}
    folder = _folder(network, tmp_path / "export", model_args=args)
    teacher = load_teacher({"model": f"local-dir:{folder}"}, 5)
    images = _images(2, 3, 32, 32)
    tokens = network.forward_features(teacher.adapter(images))
    both = (network.head(tokens[:, 0]) + network.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(teacher(images), both.detach(), rtol=1e-4, atol=1e-5)


def test_a_distilled_student_is_a_teacher_in_turn(tmp_path: Path) -> None:
    """An export with area attention and two heads gives the mean of both."""
    spec = student_options(model="vit_nano", patch_size=8, attention={"kind": "area"}, distillation_token=True)
    student = build_student(
        spec, resolution=16, num_classes=5, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2,) * 3, seed=0
    ).eval()
    for head in (student.model.head, student.model.head_dist):
        nn.init.normal_(head.weight)
    (tmp_path / "config.json").write_text(json.dumps(student.timm_config([*"abcde"])))
    save_file(student.model.state_dict(), tmp_path / "model.safetensors")
    images = _images(2, 3, 32, 32)
    heads = student(images)
    assert (heads.logits["cls"] - heads.logits["dist"]).abs().max() > 0.1
    teacher = load_teacher({"model": f"local-dir:{tmp_path}"}, 5)
    assert teacher.contract == student.adapter.contract
    torch.testing.assert_close(teacher(images), heads.fused.detach(), rtol=1e-5, atol=1e-5)


def test_broken_folders(tmp_path: Path) -> None:
    spec = {"model": f"local-dir:{tmp_path}"}
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_teacher(spec, 5)
    for content in ("{", "[]", "{}", json.dumps({"architecture": "no_such_net", "pretrained_cfg": {}})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json: does not describe a model"):
            load_teacher(spec, 5)
    _folder(timm.create_model("cifar_resnet20"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such weights file"):
        load_teacher(spec, 10)


def test_ensemble_averages_probabilities(weights: Path, tmp_path: Path) -> None:
    other = _save(timm.create_model("cifar_resnet32", num_classes=5), tmp_path / "w.safetensors", seed=3)
    specs: list[dict[str, Any]] = [
        {"model": "cifar_resnet20", "weights": str(weights), "weight": 3.0},
        {"model": "cifar_resnet32", "weights": str(other), "size": 16, "mean": [0.5] * 3, "std": [0.3] * 3},
    ]
    first, second = (load_teacher(spec, 5) for spec in specs)
    both = load_teacher(specs, 5)
    assert isinstance(both, Ensemble)
    images = _images(4, 3, 32, 32)
    mean = 0.75 * first(images).double().softmax(1) + 0.25 * second(images).double().softmax(1)
    torch.testing.assert_close(both(images).double(), mean.log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both(images).logsumexp(1), torch.zeros(4), rtol=0, atol=1e-4)
    assert not both.train().training
    assert not any(module.training for module in both.modules())
    assert not any(parameter.requires_grad for parameter in both.parameters())
    assert both.num_classes == 5
    assert both.digest not in (first.digest, second.digest)
    assert both.digest != load_teacher([specs[0] | {"weight": 1.0}, specs[1]], 5).digest
    assert "0.75 x cifar_resnet20" in both.describe()
    assert str(second.contract) in both.describe()
    assert type(load_teacher(specs[:1], 5)) is Teacher


def test_ensemble_survives_certainty(weights: Path) -> None:
    spec = {"model": "cifar_resnet20", "weights": str(weights), "std": [1e-4] * 3}  # logits in the thousands
    logits = load_teacher([spec, spec], 5)(_images(4, 3, 32, 32))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "resnt18"}, "neither in the zoo .* Close names: resnet18"),
        ({"model": "resnet18.nonsense"}, r"nonsense.*resnet18\.a1_in1k"),
        ({"model": "resnet18"}, "timm's weights for resnet18: 1000 classes, the data have 10"),
        ({"model": "torchvision/resnet18"}, "torchvision's weights for resnet18: 1000 classes, the data have 10"),
        ({"model": "torchvision/resnet19"}, "no classifier 'resnet19'. Close names: resnet18"),
        ({"model": "torchvision/fasterrcnn_resnet50_fpn"}, "no classifier"),
        ({"model": "resnet10t", "weights": "none.pth"}, r"none\.pth: no such weights file"),
        ({"model": "test_vit.untrained"}, "timm"),
        ({"modle": "resnet18"}, "teacher.modle: unknown key; did you mean 'model'"),
        ({"recipe": "recipes/teachers/x.yaml"}, "has to be trained first"),
        ([], "teacher"),
    ],
)
def test_bad_specs(spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_teacher(spec, 10)


def test_zoo_weights_for_other_data() -> None:
    with pytest.raises(InputError, match="the weights of cifar_resnet56: 10 classes, the data have 100"):
        load_teacher({"model": "cifar_resnet56"}, 100)


def test_a_contract_that_the_network_cannot_take(tmp_path: Path) -> None:
    path = _save(timm.create_model("vit_tiny_patch16_224", num_classes=5), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"cannot take its inputs.*Check teacher\.size"):
        load_teacher({"model": "vit_tiny_patch16_224", "weights": str(path), "size": 48}, 5)


@pytest.mark.parametrize("error", [OSError("no route to host"), TimeoutError("timed out")])
@pytest.mark.parametrize("model", ["resnet18", "hf_hub:somebody/something", "torchvision/resnet18"])
def test_without_network(model: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent-but-not-written")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    with pytest.raises(InputError, match=r"https://\S+: cannot be downloaded \(.*\). Fetch.*teacher.weights=PATH"):
        load_teacher({"model": model}, 1000)


def test_old_names_of_timm_are_those_of_the_new_ones() -> None:
    source = untrained_source(Spec(model="tf_efficientnet_b0_ns"), 10)
    config = timm.get_pretrained_cfg("tf_efficientnet_b0.ns_jft_in1k")
    assert (source.num_classes, source.contract) == (10, timm_contract(config.to_dict()))


def test_a_network_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images.flatten(1)[:, :4],)

    with pytest.raises(InputError, match="teacher pair: returns tuple instead of logits"):
        Teacher("pair", Pair(), InputContract((0.0,) * 3, (1.0,) * 3, 8), 4)
