"""The packed format: written atomically and deterministically, checked in full when opened."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.data.packed import Expected, open_packed, write_packed
from distill.data.torchvision_sets import KNOWN
from distill.errors import InputError

CLASSES = ("cat", "dog", "žába")


def tensors(train: int = 9, test: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{split}.{part}": value
        for split, count in (("train", train), ("test", test))
        for part, value in (
            ("images", torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator)),
            ("labels", torch.arange(count) % 3),
        )
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_packed(tmp_path / "x.safetensors", name="x", class_names=CLASSES, tensors=tensors())
    return tmp_path / "x.safetensors"


def problem(path: Path, expected: Expected | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_packed(path, expected)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def rewritten(path: Path, *, metadata: dict[str, str] | None = None, **changed: Tensor | None) -> Path:
    """The file with some tensors or metadata replaced and no digests."""
    content = tensors() | {key.replace("__", "."): value for key, value in changed.items()}
    kept = {key: value for key, value in content.items() if value is not None}
    save_file(kept, path, metadata={"classes": json.dumps(CLASSES)} if metadata is None else metadata)
    return path


def test_round_trip(path: Path) -> None:
    opened = open_packed(path, Expected(3, 9, 6, (3, 4, 5)))
    assert opened.class_names == CLASSES
    for key, tensor in tensors().items():
        assert torch.equal(opened.tensors[key], tensor)
        assert torch.equal(load_file(path)[key], tensor)
        assert opened.metadata[f"sha256/{key}"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_bytes_are_a_function_of_the_content(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    write_packed(again, name="x", class_names=CLASSES, tensors=dict(reversed(tensors().items())))
    assert again.read_bytes() == path.read_bytes()
    # The digest is that of the content, with or without digests in the file.
    assert open_packed(rewritten(again)).digest == open_packed(path).digest
    other = tensors()
    other["test.labels"][0] = 1
    write_packed(again, name="x", class_names=CLASSES, tensors=other)
    assert open_packed(again).digest != open_packed(path).digest


def test_a_failed_write_leaves_nothing_and_keeps_what_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_packed(path, name="x", class_names=CLASSES, tensors=tensors(12))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.shared
def test_the_shared_file_has_this_format(cifar10_root: Path) -> None:
    opened = open_packed(cifar10_root / "cifar10.safetensors", KNOWN["cifar10"].expected)
    assert opened.class_names[:3] == ("airplane", "automobile", "bird")
    assert torch.bincount(opened.tensors["train.labels"]).tolist() == [5000] * 10
    ours = {"name", "classes", "layout", *(f"sha256/{key}" for key in opened.tensors)}
    assert set(opened.metadata) == ours


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file; put the packed data there" in problem(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_file(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert "truncated" in problem(path)


def test_something_else_under_that_name(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "another format" in problem(path)


@pytest.mark.parametrize("offset", [-1, -100, -400])
def test_one_flipped_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert "SHA-256 differs" in problem(path)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range(path: Path, label: int) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, label])
    assert f"label {label} in test.labels is out of range: classes are 0 to 2" in problem(
        rewritten(path, test__labels=labels)
    )


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"test__images": None}, "holds the tensors test.labels, train.images"),
        ({"extra": torch.zeros(1)}, "holds the tensors extra"),
        ({"validation__images": torch.zeros(1, 3, 4, 5, dtype=torch.uint8)}, "holds the tensors"),
        ({"train__images": torch.rand(9, 3, 4, 5)}, r"train.images is float32 [9, 3, 4, 5]"),
        ({"train__images": torch.zeros(9, 4, 5, dtype=torch.uint8)}, "train.images is uint8 [9, 4, 5]"),
        ({"test__images": torch.zeros(6, 1, 4, 5, dtype=torch.uint8)}, "images of [1, 4, 5] instead of [3, 4, 5]"),
        ({"test__images": torch.zeros(0, 3, 4, 5, dtype=torch.uint8)}, "test.images is uint8 [0, 3, 4, 5]"),
        ({"train__labels": torch.zeros(9)}, "train.labels is float32 [9], not int64 [9]"),
        ({"train__labels": torch.zeros(8, dtype=torch.int64)}, "train.labels is int64 [8], not int64 [9]"),
        ({"train__labels": torch.zeros(9, dtype=torch.int64)}, "class 'dog' has no training image"),
        ({"metadata": {}}, "no 'classes'"),
        ({"metadata": {"classes": "cat dog"}}, "no 'classes'"),
        ({"metadata": {"classes": '["cat", "dog", "dog"]'}}, "no 'classes'"),
    ],
)
def test_wrong_content(path: Path, changed: dict[str, Tensor], what: str) -> None:
    assert what in problem(rewritten(path, **changed))


@pytest.mark.parametrize(
    ("expected", "what"),
    [
        (Expected(4, 9, 6, (3, 4, 5)), "names 3 classes where this dataset has 4"),
        (Expected(3, 10, 6, (3, 4, 5)), "has 9 images in 'train' where this dataset has 10"),
        (Expected(3, 9, 7, (3, 4, 5)), "has 6 images in 'test' where this dataset has 7"),
        (Expected(3, 9, 6, (3, 5, 5)), "images of [3, 4, 5] instead of [3, 5, 5]"),
    ],
)
def test_known_datasets_have_their_counts(path: Path, expected: Expected, what: str) -> None:
    assert what in problem(path, expected)


@pytest.mark.parametrize(
    ("axes", "order", "remedy"),
    [
        ((0, 2, 3, 1), "[N, H, W, C]", ".permute(0, 3, 1, 2)"),
        ((2, 3, 1, 0), "[H, W, C, N]", ".permute(3, 2, 0, 1)"),
        ((1, 2, 3, 0), "[C, H, W, N]", ".permute(3, 0, 1, 2)"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_orders_of_axes(path: Path, axes: tuple[int, ...], order: str, remedy: str, channels: int) -> None:
    right = torch.arange(9 * channels * 64, dtype=torch.int64).view(9, channels, 8, 8).to(torch.uint8)
    wrong = right.permute(axes).contiguous()
    message = problem(rewritten(path, train__images=wrong))
    assert f"train.images is uint8 {list(wrong.shape)} in the order {order}; images{remedy}.contiguous()" in message
    assert torch.equal(eval(f"wrong{remedy}"), right)


def test_grey_images_without_an_axis_of_channels(path: Path) -> None:
    message = problem(rewritten(path, train__images=torch.zeros(9, 8, 8, dtype=torch.uint8)))
    assert "in the order [N, H, W]; images[:, None].contiguous()" in message
