"""int8 ONNX files: which layers are quantized, by which images, and what is said of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import distill
from distill.cli import main
from distill.data import open_dataset
from distill.errors import InputError
from distill.exports import int8
from distill.exports.folder import load_export
from distill.exports.int8 import INT8_FILE, Cost, calibration_images, layers_of
from distill.report.answer import main_records
from distill.report.comparison import compare
from distill.report.statistics import mcnemar
from distill.run import read_recipe
from tests.conftest import Toy

CHANGES = ["teacher=null", "distill=[]", "train.epochs=1", "student.stem=conv"]


@pytest.fixture(scope="module")
def exported(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of six steps, its export with int8, and what the command printed."""
    out = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.pipeline.report_on", lambda _: None)
        patch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
        printed: list[str] = []
        patch.setattr("distill.exports.command.say", printed.append)
        assert main(["train", str(toy.recipe), *CHANGES, "--out", str(out / "run")]) == 0
        arguments = ["--int8", "--keep-float", "blocks.5", "--keep-float", "head", "--max-drop", "20"]
        assert main(["export", str(out / "run"), "--to", str(out / "student"), *arguments]) == 0
    return out / "run", out / "student", "\n".join(printed)


def test_all_layers_with_weights_are_named_and_quantized_but_for_those_kept(exported: tuple[Path, Path, str]) -> None:
    run, folder, _ = exported
    student, _ = load_export(run / "export")
    layers = layers_of(folder / "model.onnx", student)
    blocks = [
        f"blocks.{block}.{name}" for block in range(6) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    stem = [name for name in layers if name.startswith("patch_embed.proj.")]
    assert set(layers) == {*blocks, *stem, "head"}
    assert len(stem) >= 2
    model = onnx.load(folder / INT8_FILE)
    onnx.checker.check_model(model)
    producers = {output: node for node in model.graph.node for output in node.output}
    scales = {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}
    for layer, name in layers.items():
        (node,) = [node for node in model.graph.node if node.name == name]
        weight = producers.get(node.input[1])
        kept = layer.startswith("blocks.5.") or layer == "head"
        assert (weight is None) == kept, layer
        if weight is not None:
            assert weight.op_type == "DequantizeLinear"
            assert scales[weight.input[1]].size > 1, "a scale for each channel"
            assert np.abs(scales[weight.input[0]].astype(int)).max() <= 64, "7 bits"


def test_the_figures_are_those_of_the_file(exported: tuple[Path, Path, str]) -> None:
    run, folder, printed = exported
    recipe = read_recipe(run)
    dataset = open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"))
    ((images, labels),) = dataset.evaluation_batches("test", 0, 50, 50)
    answers = [
        onnxruntime.InferenceSession(folder / name).run(None, {"images": images.numpy()})[0].argmax(1)
        for name in ("model.onnx", INT8_FILE)
    ]
    before, after = (100 * float((answer == labels.numpy()).mean()) for answer in answers)
    (line,) = [line for line in printed.splitlines() if line.startswith("int8: ")]
    assert f"top-1 {after:.2f} % instead of {before:.2f} % on 50 test images" in line
    assert f"{100 * float((answers[0] == answers[1]).mean()):.2f} % of them decided alike" in line
    size = (folder / INT8_FILE).stat().st_size
    assert f"{size / 1e6:.2f} MB instead of {(folder / 'model.onnx').stat().st_size / 1e6:.2f}" in line
    assert line.removeprefix("int8: ").removesuffix(".") in (folder / "README.md").read_text()
    record = json.loads((run / "int8.json").read_text())
    assert record["correct"] == [int((answer == labels.numpy()).sum()) for answer in answers]
    assert record["agreements"] == int((answers[0] == answers[1]).sum())
    assert record["bytes"][1] == size
    assert record["kept"] == ["blocks.5", "head"]
    (quantized,) = [row for row in main_records(compare([run])) if row["label"].endswith(", int8")]
    assert quantized["top1"] == pytest.approx(after)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.int8.onnx", "model.onnx", "model.safetensors",
    ]  # fmt: skip


def test_calibration_images_are_training_images_by_the_seed(exported: tuple[Path, Path, str]) -> None:
    recipe = read_recipe(exported[0])
    student, _ = load_export(exported[0] / "export")
    dataset = open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"))
    one, same, other = (torch.cat(calibration_images(student, dataset, seed, 20)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    ((images, _),) = dataset.evaluation_batches("train", 0, 200, 200)
    known = {image.numpy().tobytes() for image in images}
    assert len({image.numpy().tobytes() for image in one} & known) == 20
    dataset.in_order = True  # as of shards, which are read once
    assert torch.equal(one, torch.cat(calibration_images(student, dataset, 0, 20)))


@pytest.fixture
def quick(exported: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the ONNX file of `exported`, and are not loaded again."""

    def copied(student: object, path: Path, classes: object) -> None:
        shutil.copy(exported[1] / "model.onnx", path)

    monkeypatch.setattr("distill.exports.folder.write_onnx", copied)
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)


@pytest.mark.usefixtures("quick")
def test_one_that_loses_too_much_is_not_written(
    exported: tuple[Path, Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = np.arange(100) < 90
    lost = Cost((90, 89), mcnemar("int8", "float32", right, right), 100, 99, (1.0, 0.5), (100, 30))
    monkeypatch.setattr(int8, "measure", lambda *args: lost)
    monkeypatch.setattr(int8, "sensitivities", lambda source, images, layers: [(layer, 1.0) for layer in layers])
    assert main(["export", str(exported[0]), "--to", str(tmp_path / "student"), "--int8", "--max-drop", "0.9"]) == 2
    error = capsys.readouterr().err
    assert "int8 loses 1.00 points of top-1 (89.00 % instead of 90.00 %), more than --max-drop 0.9" in error
    assert "blocks.0.attn.qkv" in error
    assert "--keep-float patch_embed.proj" in error
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(exported[0]), "--to", str(tmp_path / "student"), "--int8", "--max-drop", "1"]) == 0


def test_the_layer_that_is_hard_to_quantize_comes_first(exported: tuple[Path, Path, str], tmp_path: Path) -> None:
    run, folder, _ = exported
    student, _ = load_export(run / "export")
    model = onnx.load(folder / "model.onnx")
    layers = {name: node for name, node in layers_of(folder / "model.onnx", student).items() if ".mlp.fc1" in name}
    (node,) = [node for node in model.graph.node if node.name == layers["blocks.3.mlp.fc1"]]
    (weight,) = [constant for constant in model.graph.initializer if constant.name == node.input[1]]
    values = numpy_helper.to_array(weight).copy()
    values[0] += 100 * (np.arange(values.shape[1]) % 2)  # outliers set the scales of half of the channels
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    recipe = read_recipe(run)
    dataset = open_dataset(recipe.data, seed=0, device=torch.device("cpu"))
    found = int8.sensitivities(tmp_path / "model.onnx", calibration_images(student, dataset, 0, 32), layers)
    assert len(found) == 6
    assert found[0][0] == "blocks.3.mlp.fc1"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--keep-float", "blocks.6"], "--keep-float blocks.6: no such layer. There are patch_embed"),
        (["--int8", *(word for part in ("patch_embed", "blocks", "head") for word in ("--keep-float", part))],
         "no layer is left"),
        (["--int8", "--max-drop", "nan"], "--max-drop nan: from 0 to 100"),
        (["--int8", "--max-drop=-1"], "--max-drop -1: from 0 to 100"),
        (["--keep-float", "head"], "--keep-float: without --int8"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_message(
    arguments: list[str],
    message: str,
    exported: tuple[Path, Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(exported[0]), "--to", str(tmp_path / "student"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_without_the_data_or_onnx(
    exported: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.exports.command._test_set", lambda path: None)
    with pytest.raises(InputError, match="--int8: what it loses is measured on the run's data"):
        distill.export(exported[0], tmp_path / "student", int8=True)
    monkeypatch.setattr("distill.exports.onnx_file.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs onnx, onnxscript, onnxruntime"):
        distill.export(exported[0], tmp_path / "student", int8=True)
    assert list(tmp_path.iterdir()) == []
