"""An exported student is the student, for timm, in another process, and only if nothing was touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import load_model_config_from_hf

import distill.exports.folder
from distill.errors import InputError
from distill.exports.folder import Differs, describe, load_export, write_export
from distill.students import build_student, one_head
from distill.students.saved import read_export
from tests.conftest import some
from tests.students.helpers import student_options

CLASSES = [f"class {index}" for index in range(10)]
AREA = {"kind": "area", "max_area": [2, 2], "blocks": [0, 1]}


def build(model="vit_nano", **spec):
    if model.startswith("vit_n"):
        spec = {"patch_size": 4, **spec}
    student = build_student(
        student_options(model=model, **spec),
        resolution=32, num_classes=10, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), seed=0,
    )  # fmt: skip
    for name, buffer in student.named_buffers():  # as after some training
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return student.eval()


def export(student, folder, **options):
    write_export(
        student, folder, **{"class_names": CLASSES, "metadata": {"teacher": "none"}, "readme": "# A card"} | options
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Without the fresh process, for tests of what else an export does."""
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


BATCH = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"distillation_token": False},
        {"attention": AREA},
        {"attention": AREA | {"key_mode": "concat", "top_k": 5}, "stem": "conv"},
        {"stem": "conv"},
        {"model": "resnet18"},
        {"model": "cifar_resnet20"},
    ],
    ids=str,
)
def test_timm_loads_the_export_bit_equal(spec, tmp_path, unchecked):
    student = build(**spec)
    export(student, tmp_path / "export")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    weights = student.model.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(student.adapter(BATCH)), student(BATCH).fused)
    config = timm.data.resolve_data_config({}, model=model)
    assert tuple(config["mean"]) == (0.4, 0.5, 0.6)
    assert tuple(config["input_size"]) == (3, 32, 32)

    loaded, class_names = load_export(tmp_path / "export")
    assert class_names == CLASSES
    assert not loaded.training
    assert loaded.adapter.contract == student.adapter.contract
    ours, theirs = loaded(BATCH).logits, student(BATCH).logits
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(logits, theirs[head]) for head, logits in ours.items())
    assert loaded.timm_config(class_names) == student.timm_config(CLASSES)


def test_a_fresh_process_agrees_before_the_folder_appears(tmp_path):
    export(build(attention=AREA), tmp_path / "runs" / "export")
    assert sorted(os.listdir(tmp_path / "runs" / "export")) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "runs") == ["export"]


def test_a_plain_student_needs_nothing_but_timm(tmp_path, unchecked):
    student = build()
    export(student, tmp_path / "export")
    torch.save((student.adapter(BATCH), student(BATCH).fused.detach()), tmp_path / "expected.pt")
    code = (
        "import sys, timm, torch\n"
        "model = timm.create_model('local-dir:export', pretrained=True).eval()\n"
        "inputs, logits = torch.load('expected.pt')\n"
        "assert not any(name.split('.')[0] in ('distill', 'teachers') for name in sys.modules)\n"
        "torch.testing.assert_close(model(inputs), logits, rtol=0, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("what", some(["logits", "weights"]))
def test_nothing_is_left_where_the_reloaded_model_differs(what, tmp_path, monkeypatch):
    student = build()
    if what == "weights":
        write = distill.exports.folder._write_weights

        def spoil(folder, weights, metadata):
            write(folder, weights | {"norm.bias": weights["norm.bias"] + 1e-3}, metadata)

        monkeypatch.setattr(distill.exports.folder, "_write_weights", spoil)
    else:
        student.model.register_forward_hook(lambda module, inputs, output: output + 1e-3)
    with pytest.raises(Differs, match=f"other {what}"):
        export(student, tmp_path / "export")
    assert os.listdir(tmp_path) == []


def test_a_model_that_cannot_be_loaded_leaves_nothing(tmp_path):
    student = build()
    student.architecture = "unknown_architecture"
    with pytest.raises(Differs, match=r"(?s)fresh process.*unknown_architecture"):
        export(student, tmp_path / "export")
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_whole(tmp_path, unchecked):
    export(build(), tmp_path / "export")
    (tmp_path / "export" / "stale").touch()
    export(build(attention=AREA), tmp_path / "export")
    assert os.listdir(tmp_path) == ["export"]
    assert not (tmp_path / "export" / "stale").exists()
    assert load_export(tmp_path / "export")[0].architecture == "area_vit_nano"


def test_training_state_of_the_student_is_left_alone(tmp_path, unchecked):
    student = build(drop_path=0.1).train()
    export(student, tmp_path / "export")
    assert student.model.blocks[0].training
    assert student.heads == ("cls", "dist")


def test_metadata_card_and_permissions(tmp_path, unchecked):
    export(build(attention=AREA), tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["teacher"] == "none"
    assert metadata["format"] == "pt"
    assert metadata["distill_version"] == distill.__version__
    assert (tmp_path / "export" / "README.md").read_text() == "# A card"
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()}
    assert len(modes) == 1
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architecture"] == "area_vit_nano"


def test_two_exports_have_the_same_bytes(tmp_path, unchecked):
    for name in ("one", "other"):
        export(build(attention=AREA), tmp_path / name, half=True)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("spec", [{"attention": AREA, "stem": "conv"}, {"model": "resnet18"}], ids=str)
def test_half_is_half_the_file_and_loads_as_float32(spec, tmp_path, unchecked):
    student = build(**spec)
    export(student, tmp_path / "whole")
    export(student, tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.49 < sizes[1] / sizes[0] < 0.53
    loaded, _ = load_export(tmp_path / "half")
    weights = loaded.model.state_dict()
    for name, tensor in student.model.state_dict().items():
        assert weights[name].dtype == tensor.dtype
        expected = tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(weights[name], expected)
    expected = student(BATCH).fused
    assert (loaded(BATCH).fused - expected).abs().max() < 0.01 * expected.abs().max()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path, unchecked):
    student = build("resnet18")
    with torch.no_grad():
        student.model.fc.weight.mul_(1e8)
    with pytest.raises(InputError, match="--fp16: float16 is too coarse"):
        export(student, tmp_path / "export", half=True)
    assert os.listdir(tmp_path) == []


def test_one_head_in_half_passes_the_fresh_process(tmp_path):
    alone = one_head(build(attention=AREA), "dist")
    export(alone, tmp_path / "export", half=True)
    loaded, _ = load_export(tmp_path / "export")
    assert loaded.heads == ("cls",)
    torch.testing.assert_close(loaded(BATCH).fused, alone(BATCH).fused, rtol=0, atol=2e-3)


def test_whoever_looks_at_the_folder_may_refuse_it(tmp_path, unchecked):
    def refuse(folder):
        assert (folder / "config.json").is_file()
        raise Differs("no")

    with pytest.raises(Differs, match="no"):
        export(build(), tmp_path / "export", inspect=refuse)
    assert os.listdir(tmp_path) == []


def test_an_export_can_say_more_of_itself_later(tmp_path, unchecked):
    export(build(), tmp_path / "export")
    before = read_export(tmp_path / "export")
    describe(tmp_path / "export", {"accuracy": "12.34"}, "# Another card")
    after = read_export(tmp_path / "export")
    assert after.metadata["accuracy"] == "12.34"
    assert after.metadata["teacher"] == "none"
    assert all(torch.equal(tensor, before.weights[name]) for name, tensor in after.weights.items())
    assert (tmp_path / "export" / "README.md").read_text() == "# Another card"


@pytest.mark.parametrize("head", ["both", "dist"])
def test_the_hub_serves_the_folder_as_it_is(head, tmp_path, unchecked, monkeypatch):
    """timm's own way through huggingface_hub, which finds the files here instead of fetching them."""
    student = build(attention=AREA, stem="conv")
    student = student if head == "both" else one_head(student, head)
    export(student, tmp_path / "export")

    def download(repo_id, filename, **options):
        assert repo_id == "somebody/student"
        if not (tmp_path / "export" / filename).exists():
            raise EntryNotFoundError(filename, response=Mock())
        return str(tmp_path / "export" / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model("hf_hub:somebody/student", pretrained=True).eval()
    assert torch.equal(model(student.adapter(BATCH)), student(BATCH).fused)
    assert model.pretrained_cfg["label_names"] == CLASSES
    config, name, model_args = load_model_config_from_hf("somebody/student")
    assert (config["hf_hub_id"], name) == ("somebody/student", "area_vit_nano")
    assert model_args["img_size"] == 32


@pytest.fixture
def folder(tmp_path, unchecked):
    export(build(), tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file"):
        load_export(folder)


def test_a_flipped_byte_in_the_weights_is_seen(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: not what was exported"):
        load_export(folder)


def test_a_truncated_file_is_seen(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        load_export(folder)


def test_a_changed_config_is_seen(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("0.4", "0.3"))
    with pytest.raises(InputError, match=r"config\.json: not what was exported"):
        load_export(folder)


def test_weights_of_others_are_refused(folder):
    model = timm.create_model("resnet18", num_classes=10)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not an export of this project"):
        load_export(folder)
