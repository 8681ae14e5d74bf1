"""What an exported student sees in an image is what evaluation saw, and no more is needed than its folder."""

from __future__ import annotations

import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import distill
import distill.exports.folder
from distill.cli import main
from distill.data import open_dataset
from distill.data.packed import write_packed
from distill.errors import InputError
from distill.exports.folder import write_export
from distill.exports.prediction import LoadedStudent, Transform
from distill.inputs import InputContract, Preparation
from distill.recipe import Data
from distill.students import Student, build_student, one_head
from tests.students.helpers import student_options

GENERATOR = np.random.default_rng(0)
PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "digits-nano"
CLASSES = ["cat", "dog", "[red]frog", "a\x1b[31mb", "e", "f", "g"]


def pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def build(preparation: Preparation | None = None, size: int = 16) -> Student:
    spec = student_options(model="vit_nano", patch_size=8, attention={"kind": "area", "max_area": 2, "blocks": [0]})
    student = build_student(
        spec, resolution=size, num_classes=len(CLASSES), channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), seed=0
    )
    student.preparation = preparation or student.preparation
    with torch.no_grad():
        student.model.head.weight.normal_(std=0.2)
        student.model.head_dist.weight.normal_(std=0.2)
    return student.eval()


@pytest.fixture
def student() -> Student:
    return build()


@pytest.fixture
def folder(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    write_export(student, tmp_path / "student", class_names=CLASSES, metadata={}, readme="")
    return tmp_path / "student"


def test_the_package_comes_without_torch() -> None:
    code = "import sys, distill; assert callable(distill.load_student); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_transform_and_labels_in_one_call(folder: Path, student: Student) -> None:
    loaded = distill.load_student(folder)
    assert isinstance(loaded, LoadedStudent)
    model, transform, labels = loaded
    assert labels == CLASSES
    assert not any(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    image = Image.fromarray(pixels(40, 30, 3))
    logits = model(transform(image)[None])
    whole = torch.from_numpy(np.array(image.resize((16, 21), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    expected = student(whole[None, :, 2:18] / 255).fused
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not logits.requires_grad
    assert distill.load_student(str(folder)).labels == CLASSES


@pytest.mark.parametrize("head", ["cls", "dist"])
def test_a_single_head_is_loaded_likewise(head: str, student: Student, folder: Path) -> None:
    write_export(one_head(student, head), folder, class_names=CLASSES, metadata={}, readme="")
    loaded = distill.load_student(folder)
    image = Image.fromarray(pixels(16, 16, 3))
    expected = student(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255).logits[head]
    torch.testing.assert_close(loaded.model(loaded.transform(image)[None]), expected, rtol=1e-5, atol=1e-5)


def evaluated(spec: Data, contract: InputContract) -> tuple[Tensor, Transform]:
    """The test images as evaluation feeds them to a model, and the transform that says it does the same."""
    dataset = open_dataset(spec, seed=0, device=torch.device("cpu"))
    ((images, _),) = dataset.evaluation_batches("test", 0, 100, 100)
    transform = Transform(contract, Preparation.of(images[0], spec.resolution))
    return transform.adapter(images), pickle.loads(pickle.dumps(transform))


@pytest.mark.parametrize(
    ("shape", "resolution"), [((3, 16, 16), 16), ((3, 24, 24), 16), ((1, 8, 8), 16), ((3, 10, 18), 16)], ids=str
)
def test_images_of_the_test_set_come_out_as_in_evaluation(
    shape: tuple[int, ...], resolution: int, tmp_path: Path
) -> None:
    images = torch.from_numpy(pixels(4, *shape))
    tensors = {f"{split}.{what}": value for split in ("train", "test") for what, value in
               (("images", images), ("labels", torch.arange(4) % 2))}  # fmt: skip
    write_packed(tmp_path / "own.safetensors", name="own", class_names=("a", "b"), tensors=tensors)
    spec = Data(name="own.safetensors", root=str(tmp_path), resolution=resolution, validation=0)
    statistics = (0.4, 0.5, 0.6)[: shape[0]]
    expected, transform = evaluated(spec, InputContract(statistics, statistics, resolution))
    files = [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]
    assert torch.equal(torch.stack([transform(file) for file in files]), expected)
    coloured = Image.fromarray(pixels(50, 20, 3))
    assert transform(coloured).shape == (shape[0], resolution, resolution)


def test_files_of_a_folder_come_out_as_in_evaluation(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name, mode, size in (
            ("a", "RGB", (40, 25)),
            ("b", "P", (19, 33)),
            ("c", "L", (16, 16)),
            ("d", "RGBA", (9, 9)),
        ):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            image = Image.fromarray(pixels(*size, 3)).convert(mode)
            image.save(place / ("x.jpg" if mode == "RGB" else "x.png"))
    spec = Data(name="folder", root=str(tmp_path), resolution=16, validation=0)
    expected, transform = evaluated(spec, InputContract((0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 16))
    files = [Image.open(path) for path in sorted((tmp_path / "test").rglob("x.*"))]
    assert torch.equal(torch.stack([transform(file) for file in files]), expected)


def test_timms_own_transform_is_the_same(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    for size in ((16, 16), (40, 30)):
        image = Image.fromarray(pixels(*size, 3))
        torch.testing.assert_close(distill.load_student(folder).transform(image), theirs(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "problem"),
    [(Image.new("I;16", (4, 4)), "PIL mode I;16"), (Image.new("RGB", (4001, 4)), "4001 x 4 pixels are no picture")],
)
def test_images_that_are_none_are_refused(image: Image.Image, problem: str, student: Student) -> None:
    with pytest.raises(InputError, match=problem):
        Transform(student.adapter.contract, student.preparation)(image)


def test_logits_that_are_no_numbers_are_no_answer(folder: Path, tmp_path: Path) -> None:
    loaded = distill.load_student(folder)
    Image.fromarray(pixels(20, 30, 3)).save(tmp_path / "one.png")
    next(module for module in loaded.model.modules() if isinstance(module, nn.LayerNorm)).weight.fill_(math.nan)
    with pytest.raises(InputError, match=r"one\.png: the student's logits are not numbers"):
        distill.predict(loaded, [tmp_path / "one.png"])


def test_the_command_prints_the_five_best(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one [1].png", tmp_path / "two.jpg"]
    for path in paths:
        Image.fromarray(pixels(20, 30, 3)).save(path)
    assert main(["predict", str(folder), *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    loaded = distill.load_student(folder)
    blocks = re.split(r"^(?=.*(?:png|jpg)$)", printed, flags=re.MULTILINE)[1:]
    for path, block in zip(paths, blocks, strict=True):
        head, *lines = block.strip().splitlines()
        assert head == str(path)
        probabilities = loaded.model(loaded.transform(Image.open(path))[None]).softmax(1)[0]
        shares, classes = probabilities.topk(5)
        shown = [float(line.split()[0]) for line in lines]
        assert shown == pytest.approx([100 * share for share in shares.tolist()], abs=0.011)
        for line, label in zip(lines, classes.tolist(), strict=True):
            assert line.rstrip().endswith(CLASSES[label].replace("\x1b", "\\x1b"))
        assert "█" in lines[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(pixels(20, 30, 3)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("what", ["absent", "text", "empty", "folder", "deep"])
def test_a_bad_image_ends_in_one_message(
    what: str, folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{what}.png"
    if what == "text":
        path.write_text("no image")
    elif what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "deep":
        Image.new("I;16", (4, 4)).save(path)
    assert main(["predict", str(folder), str(picture), str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == error.count("\n") == 1
    assert str(path) in error


@pytest.mark.parametrize("what", ["absent", "empty", "damaged"])
def test_a_bad_folder_ends_in_one_message(
    what: str, folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "model.safetensors"
    if what == "damaged":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif what == "empty":
        weights.unlink()
    assert main(["predict", str(folder if what != "absent" else folder / "none"), str(picture)]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == error.count("\n") == 1
    assert str(folder) in error


def test_students_of_other_channels_have_no_images(student: Student) -> None:
    with pytest.raises(InputError, match="4 channels"):
        Transform(student.adapter.contract, Preparation(4))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The test set of scikit-learn's digits: uint8 [355, 8, 8], labels."""
    spec = Data(name="digits", resolution=16, validation=0)
    dataset = open_dataset(spec, seed=0, device=torch.device("cpu"))
    ((images, labels),) = dataset.evaluation_batches("test", 0, 400, 400)
    return (images[:, 0] * 255).round().to(torch.uint8), labels


def test_the_published_student_is_as_good_as_its_card_says(digits: tuple[Tensor, Tensor]) -> None:
    model, transform, names = distill.load_student(PUBLISHED)
    inputs = torch.stack([transform(Image.fromarray(image.numpy())) for image in digits[0]])
    right = (model(inputs).argmax(1) == digits[1]).sum().item()
    with safe_open(PUBLISHED / "model.safetensors", "pt") as file:
        assert file.metadata()["accuracy"] == f"{100 * right / len(inputs):.2f}"
    assert names == list("0123456789")
    assert sum(path.stat().st_size for path in PUBLISHED.iterdir()) < 3_000_000
