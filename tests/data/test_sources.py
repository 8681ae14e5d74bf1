"""Where data come from: names, downloads, packing, digits; and what is said when that fails."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from distill.data import at_hand, open_dataset, torchvision_sets
from distill.data.digits import Digits
from distill.data.packed import Expected, open_packed
from distill.data.torchvision_sets import KNOWN, Known
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")


def opened(name: str, root: Path, **spec: Any) -> Any:
    return open_dataset(Data(name=name, root=str(root), **({"validation": 0.0} | spec)), seed=0, device=CPU)


def problem(name: str, root: Path, **spec: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(name, root, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, expected: Expected) -> None:
    monkeypatch.setitem(KNOWN, name, KNOWN[name]._replace(expected=expected))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_torchvisions_greyscale_files_are_packed(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, name, Expected(10, 30, 20, (1, 28, 28)))
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = np.arange(50, dtype=np.uint8) % 10
    for split, part in (("train", slice(0, 30)), ("t10k", slice(30, 50))):
        write_idx(raw / f"{split}-images-idx3-ubyte", images[part])
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels[part])
    dataset = opened(name, tmp_path)
    assert dataset.info.channels == 1
    assert dataset.info.sizes == {"train": 30, "validation": 0, "test": 20}
    ((test, _),) = dataset.evaluation_batches("test", 0, 20, 20)
    assert torch.equal(test, torch.from_numpy(images[30:, None]).float() / 255)
    assert dataset.labels("test").tolist() == labels[30:].tolist()
    # From now on the packed file alone is enough.
    for file in raw.iterdir():
        file.unlink()
    assert opened(name, tmp_path).info == dataset.info


def test_torchvisions_cifar_files_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "cifar10", Expected(10, 40, 20, (3, 32, 32)))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", ""], ["data_batch_2", ""]])
    base = tmp_path / datasets.CIFAR10.base_folder
    base.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    labels = [row % 10 for row in range(60)]
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        rows = slice(20 * number, 20 * number + 20)
        (base / name).write_bytes(pickle.dumps({"data": images[rows].reshape(20, -1), "labels": labels[rows]}))
    names = [f"class {label}" for label in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    opened("cifar10", tmp_path, cache=str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    packed = open_packed(file)
    assert packed.class_names == tuple(names)
    assert torch.equal(packed.tensors["train.images"], torch.from_numpy(images[:40]))
    assert packed.tensors["test.labels"].tolist() == labels[40:]


class ChannelsFirst:
    """As torchvision's SVHN and STL10 hold their data."""

    made: ClassVar[list[str]] = []

    def __init__(self, root: str, split: str, download: bool) -> None:
        assert download
        self.made.append(split)
        count = {"train": 20, "test": 10}[split]
        self.data = np.arange(count * 3 * 32 * 32).astype(np.uint8).reshape(count, 3, 32, 32)
        self.labels = np.arange(count, dtype=np.uint8) % 10


def test_channels_first_sets_are_packed_once_by_whoever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "SVHN", ChannelsFirst)
    monkeypatch.setattr(ChannelsFirst, "made", [])
    shrink(monkeypatch, "svhn", Expected(10, 20, 10, (3, 32, 32)))
    with ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(lambda _: opened("svhn", tmp_path / "new" / "root").info, range(8)))
    assert ChannelsFirst.made == ["train", "test"]
    assert all(info == infos[0] for info in infos)
    assert infos[0].class_names == tuple("0123456789")
    assert not (tmp_path / "new").exists(), "packs go to the cache folder"


@pytest.mark.parametrize(
    "error",
    [URLError("Name or service not known"), RuntimeError("Error downloading\n  x"), ConnectionResetError("reset")],
)
def test_no_network_says_where_to_put_what(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "CIFAR100", fail)
    root = tmp_path / "absent"
    message = problem("cifar100", root)
    assert message.startswith(f"{root / 'cifar100.safetensors'}: no such file")
    assert f"put cifar100.safetensors (packed) or torchvision's own files of CIFAR100 into {root}" in message
    assert not root.exists(), "nothing half-written"


def test_what_is_at_hand(tmp_path: Path) -> None:
    """Opens without a download."""

    for name, is_here in (
        ("digits", True), ("folder", True), ("cifar10", False), ("hfds/cifar10", False), (f"hfds/{tmp_path}", True),
    ):  # fmt: skip
        assert at_hand(Data(name=name, root=str(tmp_path), cache=str(tmp_path / "cache"))) == is_here


def test_every_known_set_is_torchvisions() -> None:
    for known in KNOWN.values():
        assert isinstance(known, Known)
        assert hasattr(datasets, known.dataset)


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set data.root to a writable folder" in problem("cifar10", tmp_path / "file" / "below")


def test_a_tampered_packed_file_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_sets, "_pack", lambda *_: pytest.fail("packed over the user's file"))
    (tmp_path / "cifar10.safetensors").write_bytes(b"nothing of the kind")
    assert "truncated or has another format" in problem("cifar10", tmp_path)


def test_digits_are_scikit_learns() -> None:
    bunch = load_digits()
    packed = Digits.read(Data(name="digits"))
    assert len(packed.tensors["train.labels"]) + len(packed.tensors["test.labels"]) == 1797
    assert len(packed.tensors["test.labels"]) == sum(np.bincount(bunch.target) // 5)
    seen: dict[int, int] = {}
    position = {"train": 0, "test": 0}
    for image, label in zip(bunch.images, bunch.target, strict=True):
        seen[label] = seen.get(label, 0) + 1
        split = "test" if seen[label] % 5 == 0 else "train"
        row = position[split]
        position[split] += 1
        assert packed.tensors[f"{split}.labels"][row] == label
        expected = np.rint(image * 255 / 16)
        assert np.array_equal(packed.tensors[f"{split}.images"][row, 0].numpy(), expected)
    assert packed.digest == Digits.read(Data(name="digits")).digest


@pytest.mark.parametrize(
    ("name", "spec", "what"),
    [
        ("cifar11", {}, r"no dataset 'cifar11' (did you mean 'cifar10'?)"),
        ("x.safetensors", {}, "no such file"),
        ("digits", {"stream": True}, "data.stream: 'digits' is small"),
        ("hfds/x", {"stream": False}, "data.stream: 'hfds/x' can only be streamed"),
        ("wds/x", {"stream": False}, "data.stream: 'wds/x' can only be streamed"),
        ("wds/x", {"validation": 0.1}, "data.validation: 'wds/x' is read sequentially"),
        ("wds/x", {"test": 0.1}, "data.test: 'wds/x' is read sequentially"),
        ("digits", {"test": 0.1}, "data.test: 'digits' has a test split"),
        ("digits", {"fit": "pad"}, "data.fit: the images of 'digits' have one size already"),
        ("digits", {"validation": 1437.0}, "data.validation: 1437 of 1442"),
    ],
)
def test_what_cannot_be_opened(name: str, spec: dict[str, Any], what: str, tmp_path: Path) -> None:
    assert what in problem(name, tmp_path, **spec)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    for name, module, package in (("hfds/x", "datasets", "datasets"), ("wds/x", "webdataset", "webdataset")):
        try:
            __import__(module)
        except ImportError:
            message = problem(name, tmp_path)
            assert message.startswith(f"data.name: '{name}' needs the package {package}")
            assert f"pip install {package}" in message
