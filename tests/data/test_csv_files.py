"""Images listed in a .csv file, and labels as sources have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import Dataset, open_dataset
from distill.data.labels import check_labelled, encode
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")
SPLITS = ["train"] * 8 + ["test"] * 4
Row = tuple[object, ...]


def write(root: Path, labels: list[Any], splits: list[str] | None = SPLITS, header: str = "path,label,split") -> Path:
    """Image i of grey level 10 i in a folder per half; its line in x.csv."""
    lines = [header]
    for number, label in enumerate(labels):
        name = f"{'ab'[number % 2]}/{number}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), (10 * number, 0, 99), dtype=np.uint8)).save(root / name)
        lines.append(",".join(map(str, [name, label, *([splits[number]] if splits else [])])))
    (root / "x.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


def opened(root: Path, stream: bool = False, **spec: Any) -> Dataset:
    values = {"name": "x.csv", "root": str(root), "resolution": 6, "validation": 0.0, "workers": 0} | spec
    return open_dataset(Data(stream=stream, **values), seed=0, device=CPU)


def levels(dataset: Dataset, split: Any) -> list[int]:
    ((images, _),) = dataset.evaluation_batches(split, 0, 100, 100)
    return (images[:, 0, 0, 0] * 25.5).round().int().tolist()


@pytest.mark.parametrize("stream", [False, True])
def test_rows_labels_and_splits_are_those_of_the_file(stream: bool, tmp_path: Path) -> None:
    dataset = opened(write(tmp_path, ["dog", "cat"] * 6), stream)
    assert dataset.info.class_names == ("cat", "dog")
    assert dataset.info.sizes == {"train": 8, "validation": 0, "test": 4}
    assert levels(dataset, "train") == list(range(8))
    assert levels(dataset, "test") == [8, 9, 10, 11]
    assert dataset.labels("test").tolist() == [1, 0, 1, 0]
    before = dataset.info.digest
    (tmp_path / "x.csv").write_text((tmp_path / "x.csv").read_text().replace("2.png,dog", "2.png,cat"))
    changed = opened(tmp_path, stream)
    assert changed.labels("train").tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    assert changed.info.digest != before


def test_numbers_other_columns_and_no_split(tmp_path: Path) -> None:
    write(tmp_path, [[10, 9, 2][number % 3] for number in range(12)], None, "file,breed")
    assert "has no column 'path', but file, breed" in problem(tmp_path)
    columns = {"image_column": "file", "label_column": "breed", "test": 3}
    dataset = opened(tmp_path, name=str(tmp_path / "x.csv"), **columns)
    assert dataset.info.class_names == ("2", "9", "10")
    assert dataset.info.sizes["test"] == 3
    assert set(dataset.info.held_out) | {f"{'ab'[n % 2]}/{n}.png" for n in levels(dataset, "train")} == {
        f"{'ab'[number % 2]}/{number}.png" for number in range(12)
    }
    lines = (tmp_path / "x.csv").read_text().replace(",", ";")
    (tmp_path / "x.csv").write_text(lines, encoding="utf-8-sig")
    assert opened(tmp_path, **columns).info.class_names == ("2", "9", "10"), "as Excel writes it"


def problem(root: Path, **spec: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(root, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("b/3.png,cat,train", "b/33.png,cat,train", "line 5: {root}/b/33.png: no such file"),
        ("b/3.png,cat,train", "b/3.png,cat,trian", "line 5: split 'trian' is none of train, val and test"),
        ("b/3.png,cat,train", "b/3.png,cat,", "line 5: has no split"),
        ("b/3.png,cat,train", ",cat,train", "line 5: has no path"),
        ("b/3.png,cat,train", "b/../b/1.png,cat,train", "line 5: b/../b/1.png is in line 3 already"),
        ("b/3.png,cat,train", "b/3.png,,train", "split train: 1 of 8 images have no label, the first is number 3"),
        ("b/9.png,cat,test", "b/9.png,cow,test", "split test has the label 'cow', which train does not have"),
        ("cat", "dog", "split train has 1 class(es)"),
        (",test", ",train", "data.test: 'x.csv' has no test split; set data.test=0.2"),
        ("path,label,split", "path,label,label2", "has no column 'split', but path, label, label2"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    root = write(tmp_path, ["dog", "cat"] * 6)
    (root / "x.csv").write_text((root / "x.csv").read_text().replace(old, new))
    message = problem(root)
    assert str(root / "x.csv") in message or "data.test" in message
    assert words.format(root=root) in message


def test_missing_files_are_left_out_if_the_recipe_says_so(tmp_path: Path) -> None:
    root = write(tmp_path, ["dog", "cat"] * 6)
    (root / "b" / "3.png").unlink()
    (root / "a" / "4.png").write_bytes(b"no image")
    dataset = opened(root, skip_unreadable=True)
    assert levels(dataset, "train") == [0, 1, 2, 5, 6, 7]
    assert len(dataset.info.left_out) == 2


def test_a_test_split_without_labels_is_said(tmp_path: Path) -> None:
    root = write(tmp_path, ["dog", "cat"] * 4 + [""] * 4)
    assert "split test has no labels; set data.test=0.2" in problem(root)
    assert opened(root, test=2).info.sizes == {"train": 6, "validation": 0, "test": 2}


def test_columns_are_not_for_other_data(tmp_path: Path) -> None:
    assert "data.label_column: 'digits' has no columns" in problem(tmp_path, name="digits", label_column="x")


def test_labels_become_numbers_of_sorted_classes() -> None:
    names, labels = encode({"train": ["b", "a", "B", None, ""], "test": ["a"]}, "x")
    assert names == ("B", "a", "b")
    assert {split: of_split.tolist() for split, of_split in labels.items()} == {"train": [2, 1, 0, -1, -1], "test": [1]}
    assert encode({"train": ["cafe\u0301", "caf\u00e9", "x"]}, "x")[0] == ("caf\u00e9", "x")
    names, labels = encode({"train": [1, 10, 2, -1]}, "x")
    assert names == ("1", "2", "10")
    assert labels["train"].tolist() == [0, 2, 1, -1]
    assert encode({"train": [True, False]}, "x")[0] == ("False", "True")
    assert check_labelled(torch.tensor([0, 1]), "x")
    assert not check_labelled(torch.tensor([-1, -1]), "x")
