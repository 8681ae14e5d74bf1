"""ONNX files and torch's own exported programs answer what the student answers, in standard operators."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from distill.cli import main
from distill.data import open_dataset
from distill.errors import InputError
from distill.exports import onnx_file
from distill.exports.folder import load_export
from distill.exports.onnx_file import FromPixels, compare_logits, onnx_logits, write_onnx
from distill.run import read_recipe
from distill.students import Student, build_student
from tests.conftest import Command, Toy, some
from tests.students.helpers import KINDS, student_options

CLASSES = list("abcdefg")


def build(channels: int = 3, **spec: Any) -> Student:
    student = build_student(
        student_options(**({"model": "vit_nano", "patch_size": 8} | spec)),
        resolution=32, num_classes=7, channels=channels, mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.2)[:channels], seed=0,
    )  # fmt: skip
    if hasattr(student.model, "blocks"):
        shared = (spec.get("attention") or {}).get("share", False)  # between two blocks
        student.model.blocks = student.model.blocks[: 1 + shared]  # the graph of the others is the same
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if name.startswith("head"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return student.eval()


def area(max_area: int | list[int], **options: Any) -> dict[str, Any]:
    return {"attention": {"kind": "area", "max_area": max_area, "blocks": [0, 1], **options}}


SPECS = [
    area(2) | {"stem": "conv", "channels": 1},
    area([2, 2], key_mode="concat", value_mode="mean"),
    area([2, 1], key_mode="sum", top_k=5) | {"distillation_token": False},
    {"model": "resnet18", "patch_size": None},
    {"model": "focal_nano", "patch_size": None, "depths": [1, 1], "heads": [3, 6], "focal_windows": [1, 1]},
    {"model": "regionvit_nano", "patch_size": None, "depths": [1, 1], "heads": [3, 6]},
    {"model": "lg_nano", "patch_size": None, "depths": [2], "heads": [3], "paths": [2]},
    *({"attention": attention} for name, attention in KINDS.items() if name != "refiner"),  # the shared one has both
]


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    some(SPECS, 0, 7),  # an export takes ten seconds
    ids=str,
)
def test_onnxruntime_and_exported_programs_answer_as_torch_does(spec: dict[str, Any], tmp_path: Path) -> None:
    student = build(**spec)
    write_onnx(student, tmp_path / "model.onnx", CLASSES)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(used.domain, used.version) for used in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [output.name for output in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(described["labels"]) == CLASSES
    assert b"/" + Path(__file__).resolve().parts[1].encode() + b"/" not in model.SerializeToString(), "paths from here"

    batches = [torch.rand(number, spec.get("channels", 3), 32, 32) for number in (1, 3, 8)]
    expected = torch.cat([student(images).fused for images in batches])
    assert compare_logits(onnx_logits(tmp_path / "model.onnx", batches), expected).problem is None

    batch = torch.export.Dim("batch")
    program = torch.export.export(FromPixels(student), (batches[1],), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(torch.cat([reloaded(images) for images in batches]), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_files_have_the_same_bytes(tmp_path: Path) -> None:
    student = build(model="cifar_resnet20", patch_size=None)
    for name in ("one.onnx", "other.onnx"):
        write_onnx(student, tmp_path / name, CLASSES)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_other_logits_and_other_decisions_are_problems() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.5]])
    assert compare_logits(logits + 5e-5, logits).problem is None
    assert "differ by 0.001" in (compare_logits(logits + 1e-3, logits).problem or "")
    assert "1 images" in (compare_logits(logits[:, [1, 0]] * torch.tensor([[1], [0]]), logits).problem or "")
    assert compare_logits(logits * torch.nan, logits).problem is not None
    tie = torch.tensor([[1.0, 1.0 + 1e-6]])
    assert compare_logits(tie.flip(1), tie).problem is None


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, small: six steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    overrides = ["teacher=null", "distill=[]", "train.epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.pipeline.report_on", lambda _: None)
        patch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
        assert main(["train", str(toy.recipe), *overrides, "--out", str(out)]) == 0
    return out


def test_the_command_exports_what_the_run_predicted(finished: Path, tmp_path: Path, command: Command) -> None:
    """On the full test set, in real processes."""
    result = command("export", finished, "--to", "student", "--onnx")
    assert result.returncode == 0, result.stderr
    assert "on 50 test images" in result.stdout
    assert result.stdout.splitlines()[-1] == "student"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    dataset = open_dataset(read_recipe(finished).data, seed=0, device=torch.device("cpu"))
    images = (images for images, _ in dataset.evaluation_batches("test", 0, 50, 20))
    logits = onnx_logits(tmp_path / "student" / "model.onnx", images)
    predicted = load_file(finished / "predictions.safetensors")["student.fused"]
    assert torch.equal(logits.argmax(1), predicted.argmax(1))
    torch.testing.assert_close(logits, predicted, rtol=0, atol=1e-4)


@pytest.mark.soak
def test_half_and_one_head_together_without_the_data(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distill.exports.command._test_set", lambda path: None)
    to = tmp_path / "student"
    assert main(["export", str(finished), "--to", str(to), "--onnx", "--fp16", "--head", "dist"]) == 0
    assert "random images only" in capsys.readouterr().out
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        logits = load_export(to)[0](images).fused
        before = load_export(finished / "export")[0](images).logits["dist"]
    assert compare_logits(onnx_logits(to / "model.onnx", [images]), logits).problem is None
    torch.testing.assert_close(logits, before, rtol=0, atol=2e-3)
    card = (to / "README.md").read_text()
    assert "float16" in card
    assert "distillation head alone" in card
    assert "`model.onnx`" in card


@pytest.mark.soak
def test_an_onnx_file_of_another_model_is_never_announced(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(student: Student, path: Path, class_names: list[str]) -> None:
        student = copy.deepcopy(student)
        with torch.no_grad():
            student.model.norm.bias += 0.01
        write_onnx(student, path, class_names)

    monkeypatch.setattr("distill.exports.folder.write_onnx", spoilt)
    assert main(["export", str(finished), "--to", str(tmp_path / "student"), "--onnx"]) == 2
    assert "the ONNX file is another model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_one_message_says_what_to_install(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(finished), "--to", str(tmp_path / "student"), "--onnx"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'needs onnxscript: python -m pip install "distill-vit[onnx]"' in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["empty folder", "file", "broken link", "file above", "license"])
def test_what_cannot_be_had_is_refused(
    what: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, options = tmp_path / "student", []
    if what == "empty folder":
        to.mkdir()
    elif what == "file":
        to.write_text("mine")
    elif what == "broken link":
        to.symlink_to("nowhere")
    elif what == "license":
        options = ["--license", "no such: thing"]
    elif what == "file above":
        to = tmp_path / "file" / "student"
        to.parent.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(finished), "--to", str(to), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {'--license' if what == 'license' else '--to'}")
    assert sorted(tmp_path.rglob("*")) == before


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    with pytest.raises(InputError, match="larger than the 2 GiB"):
        write_onnx(build(), tmp_path / "model.onnx", CLASSES)
    assert list(tmp_path.iterdir()) == []
