"""Image folders, packed and streamed, against torchvision's own resizing and cropping."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from distill.data import BatchPlan, Dataset, DatasetInfo, open_dataset, opening
from distill.data.cache import cache_folder
from distill.data.facts import facts
from distill.data.stream import Draw, crop_box
from distill.errors import InputError
from distill.recipe import Data
from distill.recipe.augment import RandomResizedCrop

CPU = torch.device("cpu")


def opened(root: Path, stream: bool | None, **spec: Any) -> Dataset:
    values = {"name": "folder", "root": str(root), "resolution": 10, "validation": 0.0, "workers": 0} | spec
    return open_dataset(Data(stream=stream, **values), seed=0, device=CPU)


def pixels(dataset: Dataset, split: Any) -> Tensor:
    parts = dataset.evaluation_batches(split, 0, dataset.info.sizes[split], 4)
    return torch.cat([images for images, _ in parts]).mul(255).round().to(torch.uint8)


def files(root: Path, split: str) -> list[Path]:
    return sorted((root / split).rglob("*.png"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def problem(root: Path, **spec: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(root, None, **spec)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("stream", [False, True])
def test_images_are_torchvisions_resize_and_centre_crop(make_folder: Any, mode: str, stream: bool) -> None:
    root = make_folder(mode)
    dataset = opened(root, stream)
    assert dataset.info.class_names == ("ant", "bee", "cat")
    assert dataset.info.channels == len(dataset.info.mean) == (1 if mode == "L" else 3)
    for split in ("train", "test"):
        expected = []
        for path in files(root, split):
            image = tv.resize(Image.open(path), 10, InterpolationMode.BICUBIC)
            expected.append(tv.pil_to_tensor(tv.center_crop(image, [10, 10])))
        assert torch.equal(pixels(dataset, split), torch.stack(expected))
        names = [path.parent.name for path in files(root, split)]
        assert [dataset.info.class_names[label] for label in dataset.labels(split)] == names


def test_a_stream_cuts_torchvisions_resized_crop_of_the_full_image(make_folder: Any) -> None:
    root = make_folder()
    crop = RandomResizedCrop(scale=[0.1, 0.8])
    dataset = opened(root, True, augment={"random_resized_crop": {"scale": [0.1, 0.8]}})
    (batch,) = next(dataset.training_batches(BatchPlan(3, 30), epoch=2))
    paths = files(root, "train")
    boxes = set()
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        original = Image.open(paths[index])
        box = crop_box(original, index, Draw(3, 2), crop)
        boxes.add(box)
        top, left, height, width = box
        assert 0 <= top <= original.height - height
        assert 0 <= left <= original.width - width
        expected = tv.resized_crop(original, *box, [10, 10], InterpolationMode.BICUBIC)
        assert torch.equal(image.mul(255).round().to(torch.uint8), tv.pil_to_tensor(expected))
    assert len(boxes) > 20


def test_one_of_val_and_test_is_the_test_split(make_folder: Any) -> None:
    dataset = opened(make_folder(val=2), True, validation=6)
    assert dataset.info.sizes == {"train": 30, "validation": 6, "test": 6}


@pytest.mark.parametrize("stream", [False, True])
def test_a_validation_folder_serves_as_it_is(make_folder: Any, stream: bool) -> None:
    root = make_folder(val=2, test=3)
    dataset = opened(root, stream, validation=0.1)
    assert dataset.info.sizes == {"train": 36, "validation": 6, "test": 9}
    assert opened(root, stream, validation=0.0).info.sizes["validation"] == 0


def test_large_folders_stream_and_small_ones_do_not(
    make_folder: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder()
    monkeypatch.setattr(opening, "RESIDENT_LIMIT", 45 * 3 * 100 - 1)
    opened(root, None)
    assert not cache.exists()
    monkeypatch.setattr(opening, "RESIDENT_LIMIT", 45 * 3 * 100)
    opened(root, None)
    (packed,) = cache.iterdir()
    assert packed.name.startswith("set-")
    assert packed.suffix == ".safetensors"
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


def test_a_folder_is_packed_once_and_again_when_it_changed(make_folder: Any, cache: Path) -> None:
    root = make_folder()
    before = opened(root, None)
    (packed,) = cache.iterdir()
    written = packed.stat().st_mtime_ns
    opened(root, None)
    assert packed.stat().st_mtime_ns == written
    opened(root, None, resolution=6)
    assert packed.stat().st_mtime_ns == written
    changed = files(root, "train")[4]
    size = Image.open(changed).size
    Image.new("RGB", size, "red").save(changed)
    after = opened(root, None)
    assert packed.stat().st_mtime_ns != written
    assert pixels(after, "train")[4, 0].unique().tolist() == [255]
    assert after.info.digest != before.info.digest
    written = packed.stat().st_mtime_ns
    os.utime(changed, ns=(0, 0))  # as many bytes as before: the time alone tells
    opened(root, None)
    assert packed.stat().st_mtime_ns != written
    changed.unlink()
    assert opened(root, None).info.sizes["train"] == before.info.sizes["train"] - 1


def test_nothing_is_written_beside_the_images(make_folder: Any, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every new file changes the time of its folder: read-only data will do."""
    root = make_folder()

    def state() -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_mtime_ns) for path in sorted([root, *root.rglob("*")])]

    before = state()
    with caplog.at_level("INFO"):
        opened(root, False)
    assert f"packing the images of {root}, 45 in all" in caplog.text
    (packed,) = cache.iterdir()
    assert f"packed into {packed}" in caplog.text
    opened(root, False, skip_unreadable=True, cache=str(cache.parent / "chosen"))
    assert len(list((cache.parent / "chosen").iterdir())) == 2
    assert state() == before


def test_the_cache_folder_follows_the_xdg_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder(None) == tmp_path / ".cache" / "distill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "distill"
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder("given") == Path.cwd() / "given"


def test_a_cache_that_cannot_be_written_is_named(make_folder: Any) -> None:
    root = make_folder()
    (root.parent / "file").write_text("")
    message = problem(root, cache=str(root.parent / "file"))
    assert str(root.parent / "file") in message
    assert "data.cache" in message


def test_a_damaged_pack_is_made_again(make_folder: Any, cache: Path) -> None:
    root = make_folder()
    before = pixels(opened(root, False), "train")
    (packed,) = cache.iterdir()
    packed.write_bytes(packed.read_bytes()[:-1])
    assert torch.equal(pixels(opened(root, False), "train"), before)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("splits", [False, True])
def test_a_test_split_is_held_out(make_folder: Any, stream: bool, splits: bool) -> None:
    """Of folders of classes, and of a train folder: stratified, of its own seed, and named."""
    root = make_folder(train=10, val=2) if splits else make_folder(train=10)
    if not splits:
        shutil.rmtree(root / "test")
        for folder in list((root / "train").iterdir()):
            folder.rename(root / folder.name)
        (root / "train").rmdir()
        (root / "notes.txt").write_text("what this is")
        assert "data.test=0.2" in problem(root)
    dataset = opened(root, stream, test=0.2, validation=0.25)
    assert dataset.info.class_names == ("ant", "bee", "cat")
    assert dataset.info.sizes == {"train": 24 if splits else 18, "validation": 6, "test": 6}
    assert torch.bincount(dataset.labels("test")).tolist() == [2, 2, 2]
    names = [root / name for name in dataset.info.held_out]
    expected = [tv.resize(Image.open(path), 10, InterpolationMode.BICUBIC) for path in names]
    centres = torch.stack([tv.pil_to_tensor(tv.center_crop(image, [10, 10])) for image in expected])
    assert torch.equal(pixels(dataset, "test"), centres)
    everything = torch.cat([pixels(dataset, split) for split in (("train", "test") if splits else dataset.info.sizes)])
    assert len(everything.flatten(1).unique(dim=0)) == 30, "no image in two splits"

    def again(**values: Any) -> DatasetInfo:
        data = Data(**{"name": "folder", "root": str(root), "resolution": 10, "workers": 0, "test": 0.2} | values)
        return open_dataset(data, seed=7, device=CPU).info

    assert again(stream=stream).held_out == dataset.info.held_out, "the run's seed does not matter"
    other = again(stream=stream, test_seed=1)
    assert set(other.held_out) != set(dataset.info.held_out)
    assert other.digest != dataset.info.digest, "it is another test set"


def test_a_test_split_is_not_held_out_of_data_that_have_one(make_folder: Any, tmp_path: Path) -> None:
    root = make_folder()
    assert "has a test split" in problem(root, test=0.2)
    (root / "train").rename(root / "Training")
    (root / "test").rename(root / "Testing")
    assert f"{root / 'Testing'} is named like a split" in problem(root, test=0.2)


def test_what_was_found_is_said(make_folder: Any, cache: Path) -> None:
    root = make_folder(train=10)
    spec = Data(name="folder", root=str(root), resolution=10, validation=0.1)
    dataset = open_dataset(spec, seed=0, device=CPU)
    (packed,) = cache.iterdir()
    assert dict(facts(dataset.info, spec)) == {
        "data": f"folder in {root}, 39 images: train 27, validation 3, test 9",
        "classes": "3: ant, bee, cat",
        "images": "13 to 40 pixels wide, 14 to 30 high; colour, 3 channels; the shorter side resized to 10 pixels, the "
        "centre 10 x 10 cropped (data.fit=crop)",
        "pack": f"{packed}, {packed.stat().st_size / 1e6:,.1f} MB",
    }
    many = replace(dataset.info, class_names=tuple(f"class {number}" for number in range(30)))
    assert dict(facts(many, spec))["classes"].endswith("class 11 and 18 more")


def test_greyscale_files_in_a_colour_set_are_made_colour(make_folder: Any) -> None:
    root = make_folder()
    Image.open(files(root, "train")[0]).convert("L").save(files(root, "train")[0])
    for stream in (False, True):
        first = pixels(opened(root, stream), "train")[0]
        assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(make_folder: Any, cache: Path, workers: int) -> None:
    root = make_folder()
    broken = files(root, "test")[2]
    broken.write_bytes(broken.read_bytes()[:100])
    assert problem(root).startswith(f"{broken}: cannot be decoded")
    assert not cache.exists()
    dataset = opened(root, True, workers=workers)
    with pytest.raises(InputError) as caught:
        pixels(dataset, "test")
    assert str(caught.value).startswith(f"{broken}: cannot be decoded")
    assert "\n" not in str(caught.value)


def test_sixteen_bits_are_refused(make_folder: Any) -> None:
    root = make_folder()
    Image.new("I;16", (9, 9)).save(files(root, "test")[0])
    assert "convert it to 8 bits" in problem(root)


def test_both_unicode_forms_of_a_name_are_one_class(make_folder: Any) -> None:
    """macOS writes names decomposed (NFD), most others composed (NFC): copies meet in one folder."""
    root = make_folder()
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (root / "train" / "cat").rename(root / "train" / composed)
    (root / "test" / "cat").rename(root / "test" / decomposed)
    (root / "train" / decomposed).mkdir()
    files(root, "train")[-1].rename(root / "train" / decomposed / "more.png")
    for stream in (False, True):
        dataset = opened(root, stream)
        assert dataset.info.class_names == ("ant", "bee", composed)
        assert torch.bincount(dataset.labels("train")).tolist() == [12, 12, 12]
        assert dataset.labels("test").tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_folders_that_are_none(make_folder: Any, tmp_path: Path) -> None:
    assert "no such folder" in problem(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no train folder" in problem(tmp_path / "empty")
    root = make_folder()
    os.rename(root / "test", root / "tset")
    assert "has no test or val folder" in problem(root)
    os.rename(root / "tset", root / "test")
    os.rename(root / "test" / "cat", root / "test" / "cow")
    assert f"{root / 'test' / 'cow'} is a class that the train folder does not have" in problem(root)
    os.rename(root / "test" / "cow", root / "test" / "cat")
    (root / "train" / "dog").mkdir()
    assert f"{root / 'train' / 'dog'} holds no image" in problem(root)
