"""`distill init`: from a folder of images to a recipe. tests/docs/test_blocks.py trains with what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

import distill
from distill.cli import main
from distill.data import Dataset
from distill.recipe import Teacher as Spec
from distill.recipe import load
from distill.scaffold import estimate
from distill.scaffold.folder import look_at
from distill.scaffold.teacher import of_spec
from tests.conftest import Command, Toy, image_folder
from tests.teachers.test_teacher_contracts import LIBRARY, BySum, InputContract, _weights

CLASSES = ("cat", "dog", "owl")
default_cfgs = generate_default_cfgs(
    {"by_twice_the_sum": {"input_size": (3, 16, 16), "interpolation": "bilinear", "mean": (0,) * 3, "std": (1,) * 3}}
)


class ByTwiceTheSum(BySum):
    """Another network with the same tensors."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(2 * images)


@register_model
def by_twice_the_sum(pretrained: bool = False, **kwargs: Any) -> ByTwiceTheSum:
    return build_model_with_cfg(ByTwiceTheSum, "by_twice_the_sum", pretrained, **kwargs)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Split folders without one for validation, a file that is no image, and an image that ends too early."""
    image_folder(tmp_path / "my photos", CLASSES, {"train": 8, "test": 2}, width=40, height=36)
    (tmp_path / "my photos" / "train" / "cat" / "notes.txt").write_text("a cat")
    whole = tmp_path / "my photos" / "train" / "dog" / "0.png"
    (tmp_path / "my photos" / "train" / "dog" / "half.png").write_bytes(whole.read_bytes()[:2000])
    return tmp_path / "my photos"


def weights(path: Path, classes: int = 3, model: str = "cifar_resnet20", **arguments: Any) -> Path:
    torch.manual_seed(0)
    state = timm.create_model(model, num_classes=classes, **arguments).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


def test_a_recipe_and_one_for_its_teacher(photos: Path, command: Command, tmp_path: Path) -> None:
    """tmp_path is the working directory of commands."""
    done = command("init", "my photos")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "next: distill train my-photos.yaml"
    assert said[1] == "classes   3, 8 to 9 training images each: cat, dog, owl"
    assert said[2] == "images    colour, 40 x 36 pixels (of 25 looked at)"
    assert any(line.startswith("estimate") and "min" in line and "MiB" in line for line in said)
    assert "notes.txt" in done.stderr
    texts = {name: (tmp_path / name).read_text() for name in ("my-photos.yaml", "my-photos-teacher.yaml")}
    assert all(len(text.splitlines()) < 35 for text in texts.values())
    assert all(len(line) <= 120 for text in texts.values() for line in text.splitlines())
    content = yaml.safe_load(texts["my-photos.yaml"])
    assert content["data"] == {
        "name": "folder", "root": "my photos", "validation": 0.13, "resolution": 32, "skip_unreadable": True,
        "augment": {"hflip": True, "crop_padding": 4},
    }  # fmt: skip
    assert content["teacher"] == {"recipe": "my-photos-teacher.yaml"}
    assert content["student"]["model"] == "vit_nano"
    assert [one["method"] for one in content["distill"]] == ["hard", "guide"]
    assert yaml.safe_load(texts["my-photos-teacher.yaml"])["student"] == {"model": "cifar_resnet20"}
    assert command("validate", "my-photos.yaml").returncode == 0
    again = command("init", "my photos", "--out", "my-photos.yaml")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: my-photos.yaml: is there already and is not overwritten.")
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


@pytest.mark.soak
def test_class_folders_and_a_file(command: Command, tmp_path: Path) -> None:
    image_folder(tmp_path / "birds", CLASSES, {"": 10}, width=33, height=80)
    weights(tmp_path / "own.pth")
    done = command("init", "birds/", "--teacher", "own.pth", "--goal", "fast", "--out", "fast.yaml")
    assert done.returncode == 0, done.stderr
    assert "hardly more than by chance" in done.stderr  # random weights on random images
    content = yaml.safe_load((tmp_path / "fast.yaml").read_text())
    assert not (tmp_path / "fast-teacher.yaml").exists()
    assert content["data"]["test"] == 0.2
    assert content["data"]["validation"] == 0.13
    assert content["data"]["fit"] == "pad"
    teacher = content["teacher"]
    assert teacher == {
        "model": "cifar_resnet20", "weights": "own.pth", "size": 32,
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    short = ("train.max_steps=1", "teacher.min_accuracy=0", "report.analysis=none")
    trained = command("train", "fast.yaml", *short, "--out", "run")
    assert trained.returncode == 0, trained.stderr
    assert distill.Run(tmp_path / "run").status["step"] == 1


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("by_data", [True, False])
def test_the_inputs_with_which_a_file_is_best(toy: Toy, tmp_path: Path, size: int, by_data: bool) -> None:
    recipe = load(toy.recipe)
    dataset: Dataset = distill.data.open_dataset(recipe.data, seed=0, device=torch.device("cpu"))
    mean, std = (dataset.info.mean, dataset.info.std) if by_data else (LIBRARY.mean, LIBRARY.std)
    file = _weights(tmp_path / "w.safetensors", dataset, InputContract(mean, std, size, "bilinear"))
    spec = Spec(model="by_sum", weights=str(file))
    found = of_spec(spec, (), dataset, 8, torch.device("cpu"))
    assert found.section["size"] == size
    assert found.section["mean"] == pytest.approx(list(mean), rel=1e-4)
    assert found.section["std"] == pytest.approx(list(std), rel=1e-4)
    assert (found.logits, found.maps, found.warning) == (True, False, None)
    assert "100.0% of" in found.note


def test_of_architectures_with_the_same_tensors_the_right_one(toy: Toy, tmp_path: Path) -> None:
    """The second answers as the file was made for."""
    recipe = load(toy.recipe)
    dataset: Dataset = distill.data.open_dataset(recipe.data, seed=0, device=torch.device("cpu"))
    file = _weights(tmp_path / "w.safetensors", dataset, InputContract(LIBRARY.mean, (0.5, 0.5, 0.5), 16, "bilinear"))
    spec = Spec(model="by_sum", weights=str(file), mean=None)
    found = of_spec(spec, ("by_twice_the_sum",), dataset, 8, torch.device("cpu"))
    assert (found.section["model"], found.section["size"]) == ("by_twice_the_sum", 16)
    assert "100.0% of" in found.note


def test_what_is_seen_of_a_folder(tmp_path: Path) -> None:
    for index, (width, height) in enumerate([(20, 60), (24, 70), (28, 80)]):
        for name in "ab":
            (folder := tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (width, height), 40 * index).save(folder / f"{index}.png")
            (folder := tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (width, height)).save(folder / f"{index}.png")
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"no image")
    found = look_at(tmp_path)
    images = found.images
    assert (images.counts, images.validation, images.test) == ({"a": 4, "b": 3}, None, 6)  # one of the two is the test
    assert (images.side, images.grey) == (24, True)
    assert images.stretch == pytest.approx(70 / 24)
    assert [text.partition(": ")[0] for text in found.left_out] == [str(tmp_path / "train" / "a" / "3.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no such folder: nowhere"),
        (("empty",), "has 0 class folder(s), at least two are needed"),
        (("one",), "has 1 class folder(s), at least two are needed"),
        (("few",), "class 'cat' has 3 image(s); 5 or more of each class are needed to hold some out for test and val"),
        (("good", "--teacher", "resnet18"), "resnet18 has 1,000 classes, the folder has 3"),
        (("good", "--teacher", "torchvision/resnet18"), "torchvision/resnet18 has 1,000 classes, the folder has 3"),
        (("good", "--teacher", "cifar_resnet20"), "cifar_resnet20 has 10 classes, the folder has 3"),
        (("good", "--teacher", "resnet81"), "--teacher: 'resnet81' is neither in the zoo"),
        (("good", "--teacher", "five.pth"), "five.pth (cifar_resnet20) has 5 classes, the folder has 3"),
        (("good", "--teacher", "list.pth"), "list.pth: holds no state dict"),
        (("good", "--teacher", "other.pth"), "fits none of"),
        (("good", "--teacher", "absent.pth"), "absent.pth: no such weights file"),
        (("good", "--out", "absent/r.yaml"), "--out: no such folder: absent"),
        (("good", "--out", "r.txt"), "r.txt is no recipe's name"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    image_folder(Path("one"), ["cat"], {"": 5}, width=8, height=8)
    image_folder(Path("few"), CLASSES, {"": 3}, width=8, height=8)
    image_folder(Path("good"), CLASSES, {"": 6}, width=8, height=8)
    weights(Path("five.pth"), classes=5)
    torch.save([1, 2], "list.pth")
    torch.save({"encoder.a": torch.zeros(3, 4), "encoder.b": torch.zeros(3)}, "other.pth")
    before = set(tmp_path.rglob("*"))
    assert main(["init", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in " ".join(output.err.split())
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.soak
def test_greyscale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the images, and of the teacher's inputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0)
    image_folder(Path("good"), CLASSES, {"train": 6, "val": 2, "test": 2}, width=64, height=64)
    content = yaml.safe_load(
        distill.init("good", teacher=weights(Path("g.pt"), model="resnet10t", in_chans=1)).read_text()
    )
    assert content["data"]["channels"] == 1
    assert (content["teacher"]["model"], len(content["teacher"]["mean"])) == ("resnet10t", 1)
    for path in Path("good").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    content = yaml.safe_load(distill.init("good", out="grey.yaml").read_text())
    assert "channels" not in content["data"]
    assert content["data"]["augment"]["hflip"] is False
    assert content["teacher"] == {"recipe": "grey-teacher.yaml"}
    assert yaml.safe_load(Path("grey-teacher.yaml").read_text())["student"] == {"model": "resnet18"}


def test_a_name_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs are the library's, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0)
    image_folder(Path("ten"), [*map(str, range(10))], {"train": 4, "val": 1, "test": 1}, width=32, height=32)
    content = yaml.safe_load(distill.init("ten", teacher="cifar_resnet20").read_text())
    assert content["teacher"] == {"model": "cifar_resnet20"}
    assert [one["method"] for one in content["distill"]] == ["hard", "guide"]
    assert main(["validate", "ten.yaml"]) == 0


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0)
    image_folder(Path("good"), CLASSES, {"train": 6, "val": 2, "test": 2}, width=64, height=64)
    file = weights(Path("own.pt"), model="resnet10t")
    path = distill.init("good", teacher=file, goal="accurate", out="a.yaml")
    assert path == Path("a.yaml")
    recipe = load(path)
    assert recipe.teachers[0].model == "resnet10t"
    assert (recipe.data.resolution, recipe.student.model, recipe.student.patch_size) == (64, "vit_micro", 8)
    with pytest.raises(distill.InputError, match="--goal: one of small, accurate, fast, got 'best'"):
        distill.init("good", goal="best")  # type: ignore[arg-type]
