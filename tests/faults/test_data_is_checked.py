"""Data are checked before training: what is wrong with them is refused by name, or left out where the recipe allows."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.data import BatchPlan, Dataset, open_dataset
from distill.data.packed import open_packed
from distill.errors import InputError
from distill.recipe import Data
from tests.conftest import Counted, Toy
from tests.faults.damage import damage
from tests.warm import launch

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images in each of three classes for training and four for the test."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    chance = random.Random(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in CLASSES:
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.frombytes("RGB", (12, 10), chance.randbytes(360))
                image.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    return tmp_path / "set"


def opened(root: Path, *, stream: bool, skip: bool = False) -> Dataset:
    spec = Data(name="folder", root=str(root), resolution=8, validation=0.0, workers=0, stream=stream,
                skip_unreadable=skip)  # fmt: skip
    return open_dataset(spec, seed=0, device=CPU)


def link_to(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# What is done to the file train/bee/3.png, and the file that is named then.
SPOILED: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda file: file.write_bytes(b""),
    "no image inside": lambda file: file.write_text("not an image"),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:12]),
    "sixteen bits": lambda file: Image.new("I;16", (9, 9)).save(file),
    "a line of pixels": lambda file: Image.new("RGB", (5000, 1)).save(file),
    "a bomb": lambda file: Image.new("1", (14_000, 14_000)).save(file),
    "a link to nothing": lambda file: link_to(file, file.with_name("nothing")),
    "a link to itself": lambda file: link_to(file, file),
    "a pipe": a_pipe,
    "a text among images": lambda file: file.rename(file.with_name("3.txt")),
    "a loop of folders": lambda file: link_to(file.with_name("loop"), file.parent.parent),
    "an image in no class": lambda file: shutil.copy(file, file.parent.parent / "stray.png"),
}
NAMED = {"a text among images": "3.txt", "a loop of folders": "loop", "an image in no class": "stray.png"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", SPOILED)
def test_what_is_unreadable_in_a_folder_is_refused_by_name_or_left_out(how: str, stream: bool, root: Path) -> None:
    intact = opened(root, stream=stream)
    SPOILED[how](root / "train" / "bee" / "3.png")
    with pytest.raises(InputError) as caught:
        opened(root, stream=stream)
    assert NAMED.get(how, "3.png") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "skip_unreadable=true" in str(caught.value)
    dataset = opened(root, stream=stream, skip=True)
    assert len(dataset.info.left_out) == 1
    assert NAMED.get(how, "3.png") in dataset.info.left_out[0]
    lost = 0 if NAMED.get(how, "3.txt") != "3.txt" else 1
    assert dataset.info.sizes["train"] == intact.info.sizes["train"] - lost
    assert dataset.info.digest != intact.info.digest or not lost


def test_a_stream_names_what_only_decoding_finds_when_it_comes_to_it(root: Path) -> None:
    file = root / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:-100])
    dataset = opened(root, stream=True)
    with pytest.raises(InputError, match=r"3\.png: cannot be decoded"):
        list(dataset.training_batches(BatchPlan(0, 24), epoch=0))
    assert "3.png" in opened(root, stream=True, skip=True).info.left_out[0]


@pytest.mark.parametrize("stream", [False, True])
def test_batches_keep_their_size_whoever_asks_and_whenever(stream: bool, root: Path) -> None:
    for number in (1, 3, 4):
        (root / "train" / "cat" / f"{number}.{'png' if number % 2 else 'jpg'}").write_bytes(b"")

    def indices(first_step: int = 0, processes: int = 1) -> list[list[tuple[int, Tensor]]]:
        steps: list[list[tuple[int, Tensor]]] = []
        for process in range(processes):
            dataset = opened(root, stream=stream, skip=True)
            plan = BatchPlan(3, 8, num_processes=processes, process_index=process)
            for step, (batch,) in enumerate(dataset.training_batches(plan, epoch=1, first_step=first_step)):
                steps += [[]] if process == 0 else []
                steps[step] += zip(batch.indices.tolist(), batch.images, strict=True)
        return steps

    whole = indices()
    assert [len(step) for step in whole] == [8, 8]
    for other in (indices(), indices(processes=2)):
        for step, again in zip(whole, other, strict=True):
            assert [index for index, _ in step] == [index for index, _ in again]
            assert all(torch.equal(one, two) for (_, one), (_, two) in zip(step, again, strict=True))
    assert [index for index, _ in indices(first_step=1)[0]] == [index for index, _ in whole[1]]
    # It is written down what was left out; a record that is damaged, or of other files, counts for nothing.
    (record,) = (root.parent / "cache").glob("*.json")
    before = record.read_bytes()
    record.write_bytes(before.replace(b'"train"', b'"trbin"'))
    assert len(opened(root, stream=stream, skip=True).info.left_out) == 3
    assert record.read_bytes() == before
    (root / "train" / "cat" / "5.png").write_bytes(b"")
    assert len(opened(root, stream=stream, skip=True).info.left_out) == 4


def test_classes_have_images_in_every_split(root: Path, tmp_path: Path) -> None:
    def problem(**options: Any) -> str:
        with pytest.raises(InputError) as caught:
            opened(root, stream=True, **options)
        return str(caught.value)

    cow, bee = root / "test" / "cow", root / "test" / "bee"
    cow.mkdir()
    assert f"{cow} is a class that the train folder does not have" in problem(skip=True)
    cow.rmdir()
    bee.rename(tmp_path / "kept")
    assert f"{bee} holds no image" in problem()
    bee.mkdir()
    assert f"{bee} holds no image" in problem()
    assert opened(root, stream=True, skip=True).info.sizes["test"] == 8
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    assert f"{root / 'train' / 'bee'} holds no image" in problem(skip=True)
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").symlink_to(root / "train")
    assert f"{root / 'train' / 'bee'}" in problem()
    link_to(root / "train" / "bee", root / "train" / "bee")
    assert "bee" in problem()


@pytest.mark.parametrize("what", ["set", "set/train", "set/train/bee", "set/train/bee/3.png"])
def test_a_path_without_permission_is_named(what: str, root: Path, tmp_path: Path) -> None:
    """In a process of its own that is not root, for whom nothing is forbidden."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    forbidden = tmp_path / what
    forbidden.chmod(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setresuid(65534, 65534, 65534)
            opened(root, stream=True)
            os.write(writing, b"opened")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    forbidden.chmod(0o755)
    message = os.read(reading, 10_000).decode()
    assert message.startswith("InputError: ")
    assert str(forbidden) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_damaged_images_end_in_a_message_or_in_pixels(count: int, root: Path, tmp_path: Path, counted: Counted) -> None:
    """An image file has no digest: what can be decoded counts as an image. Nothing else may happen."""
    chance, held, refused = random.Random(0), 0, 0
    image = Image.open(root / "train" / "bee" / "3.png")
    formats = ["png", "jpg", "bmp", "webp", "tiff", "ppm", "gif"]
    for suffix in formats:
        image.save(tmp_path / f"intact.{suffix}")
    for number in range(count):
        suffix = formats[number % len(formats)]
        file = root / "train" / "bee" / f"new.{suffix}"
        shutil.copy(tmp_path / f"intact.{suffix}", file)
        damage(file, chance)
        try:
            opened(root, stream=False)
        except InputError as error:
            refused += 1
            held += file.name in str(error) and "\n" not in str(error)
        else:
            held += 1
        file.unlink(missing_ok=True)
    counted("damaged images refused by name, or decoded", done=held, of=count, refused=refused)


def altered(toy: Toy, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The toy data as someone else might have packed them, wrongly and without digests."""
    tensors = load_file(toy.root / "toy.safetensors")
    with safe_open(toy.root / "toy.safetensors", "pt") as file:
        classes = file.metadata()["classes"]
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "toy.safetensors", {"classes": classes})
    return folder / "toy.safetensors"


def labelled(value: int) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["train.labels"][7] = value

    return change


def holding_nan(tensors: dict[str, Tensor]) -> None:
    tensors["train.images"] = tensors["train.images"].float() / 255
    tensors["train.images"][0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (labelled(4), "label 4 in train.labels is out of range"),
        (labelled(-1), "label -1 in train.labels is out of range"),
        (labelled(-(2**63)), "out of range"),
        (holding_nan, "train.images is float32 [128, 3, 8, 8], not uint8"),
        (lambda tensors: tensors.update({"test.labels": tensors["test.labels"].int()}), "test.labels is int32 [50]"),
        (lambda tensors: tensors.update({"train.images": tensors["train.images"][0]}), "train.images is uint8 [3, 8"),
        (lambda tensors: tensors.update({"train.images": torch.ones((), dtype=torch.uint8)}), "images is uint8 []"),
        (lambda tensors: tensors.pop("test.images"), "holds the tensors test.labels"),
        (lambda tensors: [tensors.pop(key) for key in ("test.images", "test.labels")], "holds the tensors"),
        (lambda tensors: tensors.clear(), "holds the tensors (none)"),
    ],
)  # fmt: skip
def test_a_packed_file_that_makes_no_sense_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], words: str, toy: Toy, tmp_path: Path
) -> None:
    path = altered(toy, tmp_path / "data", change)
    with pytest.raises(InputError) as caught:
        open_packed(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_the_command_refuses_or_counts(stream: bool, toy: Toy, root: Path, tmp_path: Path) -> None:
    (root / "train" / "bee" / "3.png").write_bytes(b"")
    recipe = toy.mapping(data={"name": "folder", "root": str(root), "stream": stream, "workers": 0}, teacher=None)
    recipe |= {"distill": [], "train": recipe["train"] | {"max_steps": 1, "batch_size": 8}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    refused = launch(["train", "recipe.yaml", "--out", "run"], cwd=tmp_path)
    assert refused.wait() == [2], refused.output
    assert f"{root / 'train' / 'bee' / '3.png'}" in refused.output
    assert "Traceback" not in refused.output
    allowed = launch(
        ["train", "recipe.yaml", "data.skip_unreadable=true", "data.fit=squash", "--out", "run"], cwd=tmp_path
    )
    assert allowed.wait() == [0], allowed.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["data_left_out"]["count"] == 1
    assert "3.png" in status["data_left_out"]["first"][0]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "1 files are skipped" in log
    assert "classes: 3: ant, bee, cat" in log
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["preparation"]["fit"] == config["pretrained_cfg"]["crop_mode"] == "squash"
    assert f"data: {'set' if stream else 'folder'} in {root}, 35 images: train 17, validation 6, test 12" in log
