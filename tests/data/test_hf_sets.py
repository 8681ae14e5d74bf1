"""Hugging Face sets: columns, kinds of labels and splits. Needs the packages datasets and pyarrow."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from distill.data import Dataset, open_dataset
from distill.data.hf_sets import find_columns
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")
CLASS = {"names": ["blue", "red"], "_type": "ClassLabel"}
VALUE = {"_type": "Value"}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))

    def png(number: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (9, 9), (number, 0, 0)).save(file, "PNG")
        return file.getvalue()

    def write(columns: dict[str, tuple[Any, dict[str, Any]]], **splits: dict[str, list[Any]]) -> str:
        """A folder of parquet files as the Hub has it: feature and pyarrow type of each column, and the values of all
        but the images by split. Image i is of red i.
        """
        folder = tmp_path / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for split, values in splits.items():
            count = len(next(iter(values.values())))
            images = [{"bytes": png(number), "path": None} for number in range(count)]
            file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            arrays = {name: pa.array(values.get(name, images), kind or file) for name, (kind, _) in columns.items()}
            info = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
            table = pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps(info)})
            pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        return f"hfds/{folder.parent}"

    return write


IMAGE = (None, {"_type": "Image"})


def opened(name: str, root: Path, **spec: Any) -> Dataset:
    values = {"resolution": 9, "validation": 0.0, "workers": 0} | spec
    return open_dataset(Data(name=name, root=str(root / "downloads"), **values), seed=0, device=CPU)


def problem(name: str, root: Path, **spec: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(name, root, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("image", "label", "kind", "feature", "values", "names"),
    [
        ("image", "label", "int64", CLASS, [1, 0], ("blue", "red")),
        ("img", "labels", "int64", CLASS, [1, 0], ("blue", "red")),
        ("photo", "breed", "string", VALUE | {"dtype": "string"}, ["red", "blue"], ("blue", "red")),
        ("image", "label", "bool_", VALUE | {"dtype": "bool"}, [True, False], ("False", "True")),
        ("image", "label", "int64", VALUE | {"dtype": "int64"}, [12, 3], ("3", "12")),
    ],
    ids=["usual", "other columns", "strings", "bools", "numbers"],
)
def test_columns_and_labels_by_their_types(
    image: str,
    label: str,
    kind: str,
    feature: Any,
    values: list[Any],
    names: tuple[str, ...],
    make: Any,
    tmp_path: Path,
) -> None:
    import pyarrow as pa

    columns = {image: IMAGE, label: (getattr(pa, kind)(), feature)}
    name = make(columns, train={label: values * 6}, test={label: values[::-1]})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    dataset = opened(name, tmp_path)
    assert dataset.info.class_names == names
    assert dataset.info.sizes == {"train": 12, "validation": 0, "test": 2}
    assert dataset.labels("train").tolist() == [1, 0] * 6
    assert dataset.labels("test").tolist() == [0, 1]
    ((images, _),) = dataset.evaluation_batches("test", 0, 2, 2)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    os.utime(file, ns=(0, 0))
    assert opened(name, tmp_path).info.digest != dataset.info.digest


def test_splits_without_labels(make: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    columns = {"image": IMAGE, "label": (pa.int64(), CLASS)}
    name = make(columns, train={"label": [0, 1] * 5}, test={"label": [-1] * 3})
    message = problem(name, tmp_path)
    assert "split test has no labels; set data.test=0.2" in message
    assert "the columns image (Image), label (ClassLabel of 2), and the splits train (10), test (3)" in message
    assert opened(name, tmp_path, test=2).info.sizes == {"train": 8, "validation": 0, "test": 2}
    make(columns, validation={"label": [1, 0]})
    assert opened(name, tmp_path, validation=0.1).info.sizes == {"train": 9, "validation": 1, "test": 2}
    make(columns, test={"label": [1, 1, 0]})
    assert opened(name, tmp_path, validation=0.1).info.sizes == {"train": 10, "validation": 2, "test": 3}
    assert "has a test split; set data.test to null" in problem(name, tmp_path, test=2)
    make(columns, test={"label": [1, -1, 0]})
    assert "split test: 1 of 3 images have no label, the first is number 1" in problem(name, tmp_path)
    make(columns, train={"label": [-1, -1]}, test={"label": [0, 1]})
    assert "split train has no labels in column 'label'" in problem(name, tmp_path)


def test_one_message_says_what_there_is(make: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    columns = {name: (pa.int64(), CLASS) for name in ("fine", "coarse")}
    columns = {"image": IMAGE, **columns, "x": (pa.float64(), VALUE | {"dtype": "float64"})}
    labels = {"fine": [0, 1], "coarse": [1, 0], "x": [0.5, 0.5]}
    name = make(columns, train=labels, test=labels)
    has = (
        "the columns image (Image), fine (ClassLabel of 2), coarse (ClassLabel of 2), x (float64), and the splits train"
    )
    assert has in problem(name, tmp_path)
    assert opened(name, tmp_path, label_column="coarse").labels("test").tolist() == [1, 0]
    for key, chosen in (("label_column", "labels"), ("label_column", "x"), ("image_column", "x")):
        message = problem(name, tmp_path, **{"label_column": "fine", key: chosen})
        assert message.startswith(f"data.{key}: ")
        assert f"'{chosen}'" in message
        assert has in message


def test_what_cannot_be_opened_is_one_message(make: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in problem(f"hfds/{tmp_path / 'empty'}", tmp_path)


def test_columns_are_found_without_the_package() -> None:
    class Image: ...

    class Value(SimpleNamespace): ...

    text, label = Value(dtype="string"), SimpleNamespace(names=["a"], dtype="int64")
    spec = Data(name="hfds/x")
    assert find_columns(spec, {"image": Image(), "caption": text, "y": label}, "") == ("image", "y")
    assert find_columns(spec, {"a": Image(), "img": Image(), "label": text, "id": text}, "") == ("img", "label")
    with pytest.raises(InputError, match="several such columns"):
        find_columns(spec, {"image": Image(), "caption": text, "id": text}, "")
    with pytest.raises(InputError, match="no such column"):
        find_columns(spec, {"image": Image(), "score": Value(dtype="float32")}, "")
