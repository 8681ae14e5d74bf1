from __future__ import annotations

import argparse
import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import teachers.cifar_resnet  # noqa: F401
from distill.errors import InputError
from distill.files.digests import state_digest
from teachers import load_teacher
from teachers.weights import download, load_weights, read_state_dict


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20").state_dict()


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _fresh(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(99)
    return timm.create_model("cifar_resnet20", num_classes=num_classes)


WRAPPINGS: dict[str, Any] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "best_prec1": 91.7},
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "nested": lambda s: {"model": {"state_dict": s}},
    "DataParallel": lambda s: {"state_dict": _prefixed(s, "module.")},
    "compiled": lambda s: _prefixed(s, "_orig_mod."),
    "compiled, then DDP": lambda s: _prefixed(s, "module._orig_mod."),
    "DDP, then compiled": lambda s: _prefixed(s, "_orig_mod.module."),
    "averaged beside raw": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "pytorch-cifar": lambda s: {"net": s, "acc": 95.1, "epoch": 200},
    "ema beside model": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
    "AveragedModel": lambda s: {"model_ema": {"n_averaged": torch.tensor(5), **_prefixed(s, "module.")}},
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=list(WRAPPINGS))
def test_every_wrapping_gives_the_same_weights(
    wrap: Any, legacy: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.th"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    network = _fresh()
    assert state_digest(network.state_dict()) != state_digest(state)
    load_weights(network, path, num_classes=10)
    assert state_digest(network.state_dict()) == state_digest(state)


def test_safetensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(_prefixed(state, "module."), tmp_path / "weights.safetensors")
    network = _fresh()
    load_weights(network, tmp_path / "weights.safetensors", num_classes=10)
    assert state_digest(network.state_dict()) == state_digest(state)


def test_half_precision_weights_become_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pt")
    network = _fresh()
    load_weights(network, tmp_path / "w.pt", num_classes=10)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    torch.testing.assert_close(network.state_dict()["conv1.weight"], state["conv1.weight"], atol=1e-3, rtol=0)


def test_missing_surplus_and_misshapen_keys_are_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    for number in range(3):
        del state[f"layer2.{number}.conv1.weight"]
    state |= {f"extra.{number}": torch.zeros(1) for number in range(9)}
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    network = _fresh()
    before = state_digest(network.state_dict())
    with pytest.raises(InputError) as caught:
        load_weights(network, tmp_path / "w.pth", num_classes=10)
    message = str(caught.value)
    assert "w.pth" in message
    assert "3 missing: layer2.0.conv1.weight, layer2.1.conv1.weight, layer2.2.conv1.weight" in message
    assert "9 surplus: extra.0, extra.1, extra.2, extra.3, extra.4, ... (9 in all)" in message
    assert "1 of another shape: conv1.weight [16, 1, 3, 3] instead of [16, 3, 3, 3]" in message
    assert state_digest(network.state_dict()) == before


def test_another_class_count_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"linear\.weight.*They have 10 classes, the data have 100"):
        load_weights(_fresh(100), tmp_path / "w.pth", num_classes=100)


class _RunsCommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "beside weights", "zip called safetensors"])
def test_code_in_a_file_never_runs(how: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    trace, path = tmp_path / "ran", tmp_path / ("w.safetensors" if "safetensors" in how else "w.pth")
    evil: Any = _RunsCommand(f"touch {trace}")
    if how == "beside weights":
        evil = {"state_dict": state, "args": evil}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(InputError, match=r"w\.\w+: " + ("not a safetensors" if "safetensors" in how else "holds code")):
        read_state_dict(path)
    assert not trace.exists()
    if how == "bare pickle":  # the file does what this test says it does
        pickle.loads(path.read_bytes())
        assert trace.exists()


def test_a_whole_pickled_model_is_code_too(tmp_path: Path) -> None:
    torch.save(_fresh(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds code \(it imports teachers\.cifar_resnet\.CifarResNet\)"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "w.pth"), (b"hello, world", "w.pth"), (b"hello, world", "w.safetensors"),
     (b"PK\x03\x04broken", "w.pt"), (b"", "w.safetensors")],
)  # fmt: skip
def test_a_foreign_file(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not a (torch|safetensors) file of tensors, or damaged"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", r"Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\xef\xbb\xbf\n  <html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    ],
)
def test_what_is_often_taken_for_weights_is_recognised(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_state_dict(tmp_path / name)


def test_torchscript_is_recognised_and_not_run(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"TorchScript.*jit\.load\(.*state_dict"):
        read_state_dict(tmp_path / "w.pt")


def test_settings_stored_beside_weights_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    """As in the checkpoints of DeiT and many others."""
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"imports argparse\.Namespace.*settings of a training.*If you trust it"):
        read_state_dict(tmp_path / "w.pth")


def test_a_folder_of_transformers_is_recognised(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    torch.save({"vit.embeddings.cls_token": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    for spec in (
        {"model": f"local-dir:{tmp_path}"},
        {"model": "cifar_resnet20", "weights": str(tmp_path)},
        {"model": "cifar_resnet20", "weights": str(tmp_path / "pytorch_model.bin")},
    ):
        with pytest.raises(InputError, match=r"of transformers \(model_type 'vit'\).*hf_hub:timm"):
            load_teacher(spec, 10)
    (tmp_path / "config.json").write_text('{"architecture": "cifar_resnet20"}')
    with pytest.raises(InputError, match=r"a folder, not a weights file.*local-dir:"):
        load_teacher({"model": "cifar_resnet20", "weights": str(tmp_path)}, 10)


PREFIXES = ["model.", "net.", "backbone.", "student.", "model.backbone.", "module.net.", "a-b_c.0.", "layer1."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_of_all_keys_is_removed_and_said(
    prefix: str,
    state: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    torch.save({"state_dict": _prefixed(state, prefix), "pytorch-lightning_version": "2.5"}, tmp_path / "w.ckpt")
    network = _fresh()
    with caplog.at_level(logging.INFO, "distill"):
        assert load_weights(network, tmp_path / "w.ckpt", num_classes=10) == 10
    assert state_digest(network.state_dict()) == state_digest(state)
    assert f"the prefix '{prefix.removeprefix('module.')}' of all keys was removed" in caplog.text


def test_a_prefix_before_weights_without_a_head(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({f"encoder.{k}": v for k, v in state.items() if not k.startswith("linear.")}, tmp_path / "w.pth")
    network = _fresh()
    assert load_weights(network, tmp_path / "w.pth", num_classes=10) == 0
    assert torch.equal(network.state_dict()["conv1.weight"], state["conv1.weight"])


def test_a_prefix_is_not_removed_unless_all_fits(state: dict[str, Tensor], tmp_path: Path) -> None:
    both = _prefixed(state, "student.") | _prefixed(state, "teacher.")
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(InputError, match=r"Those that begin with 'student\.' or 'teacher\.' have this model's names"):
        load_weights(_fresh(), tmp_path / "both.pth", num_classes=10)
    torch.save(_prefixed(state | {"linear.bias": torch.zeros(3)}, "net."), tmp_path / "shape.pth")
    with pytest.raises(InputError, match="do not fit the model"):
        load_weights(_fresh(), tmp_path / "shape.pth", num_classes=10)


def test_a_truncated_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(InputError, match="damaged"):
            read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "lr": 0.1}, {}, {"state_dict": {}}, torch.zeros(3)])
def test_a_torch_file_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: holds no state dict"):
        read_state_dict(tmp_path / "w.pt")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth: no such weights file"):
        read_state_dict(tmp_path / "nowhere.pth")


def test_digest_knows_values_names_shapes_and_types_but_not_order(state: dict[str, Tensor]) -> None:
    original = state_digest(state)
    assert state_digest(dict(reversed(state.items()))) == original
    assert (
        state_digest({k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()})
        == original
    )
    for change in (
        {"linear.bias": state["linear.bias"] + 1},
        {"linear.bias": state["linear.bias"].reshape(2, 5)},
        {"linear.bias": state["linear.bias"].view(torch.int32)},
        {"more": torch.zeros(0)},
    ):
        assert state_digest(state | change) != original


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "home" / "hub" / "checkpoints"


def test_download_checks_the_hash_and_keeps_the_file(hub: Path, tmp_path: Path) -> None:
    source = tmp_path / "w-0123.th"
    source.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(InputError, match="not the expected file"):
        download(source.as_uri(), "00000000")
    assert list(hub.iterdir()) == []
    path = download(source.as_uri(), sha256[:8])
    assert path == hub / source.name
    source.unlink()
    assert download(source.as_uri(), sha256[:8]).read_bytes() == b"weights"
    path.write_bytes(b"tampered")
    with pytest.raises(InputError, match="Delete it"):
        download(source.as_uri(), sha256[:8])


def test_without_network_the_message_says_where_the_file_goes(hub: Path, tmp_path: Path) -> None:
    url = (tmp_path / "absent.th").as_uri()
    with pytest.raises(InputError) as caught:
        download(url, "00000000")
    assert url in str(caught.value)
    assert str(hub / "absent.th") in str(caught.value)
    assert "teacher.weights=PATH" in str(caught.value)
