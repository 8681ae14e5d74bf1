"""webdataset runs what begins like `pipe:`; no such address reaches it, from a recipe or from a set's own list."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.data import BatchPlan, open_dataset
from distill.errors import InputError
from distill.recipe import Data

pytest.importorskip("webdataset")


def write_set(root: Path, train: list[str]) -> None:
    """Shards of four images, and the list that names the training shards `train`."""
    root.mkdir(parents=True)
    for split in ("train", "validation"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for number in range(4):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(f"{number}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    splits = {
        name: {"name": name, "num_samples": 4, "filenames": files, "shard_lengths": [4] * len(files)}
        for name, files in (("train", train), ("validation", ["validation.tar"]))
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


def labels(root: str) -> list[int]:
    data = Data(name="wds/x", root=root, resolution=8, validation=0, workers=0)
    dataset = open_dataset(data, seed=0, device=torch.device("cpu"))
    return sorted(dataset.labels("test").tolist() + dataset.labels("train").tolist())


def test_a_local_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set", ["train.tar"])
    assert labels(str(tmp_path / "set")) == [0, 0, 0, 0, 1, 1, 1, 1]
    monkeypatch.chdir(tmp_path)
    assert labels("set") == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "root",
    ["pipe:touch {mark}; cat {set}", "pipe:touch {mark} #", "set::pipe:touch {mark}", "{{set,pipe:touch {mark}}}",
     "file:{set}", "file://{set}", "http://127.0.0.1:9/set", "gs://bucket/set", "hf://a/b", "ais://a/b", "-"],
)  # fmt: skip
def test_no_scheme_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    write_set(tmp_path / "set", ["train.tar"])
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "mark"
    text = root.format(mark=mark, set=tmp_path / "set")
    with pytest.raises(InputError, match=r"data\.root: .* is no folder"):
        labels(text)
    assert not mark.exists()


def test_a_folder_of_such_a_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = "pipe:touch mark; cat "
    write_set(Path(root), ["train.tar"])
    assert labels(root) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pipe:touch {mark}", "pipe:touch {mark} #.tar", "train.tar::pipe:touch {mark}"])
def test_nor_one_of_the_list_of_shards(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    write_set(tmp_path / "set", [name.format(mark=mark)])
    with suppress(InputError, OSError):
        data = Data(name="wds/x", root=str(tmp_path / "set"), resolution=8, validation=0, workers=0)
        dataset = open_dataset(data, seed=0, device=torch.device("cpu"))
        list(dataset.training_batches(BatchPlan(seed=0, batch_size=2), 0))
    assert not mark.exists()


HOSTILE_LISTS = {
    "no JSON": "{", "a list": "[]", "deep": '{"splits": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "splits are a list": '{"splits": []}', "a split is a number": '{"splits": {"train": 1}}',
    "a number": '{"splits": {"train": {"name": "train", "num_samples": 4, "filenames": [1], "shard_lengths": [4]}}}',
    "negative": '{"splits": {"train": {"name": "train", "num_samples": -4, "filenames": [], "shard_lengths": []}}}',
    "a text": '{"splits": {"train": {"name": "train", "num_samples": 4, "filenames": "abc", "shard_lengths": [4]}}}',
    "long": '{"splits": {}, "a": "' + "x" * (5 << 20) + '"}',
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_LISTS)
def test_a_list_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set", ["train.tar"])
    (tmp_path / "set" / "_info.json").write_text(HOSTILE_LISTS[name])
    with pytest.raises(InputError, match=r"set/_info\.json: [^\n]*$"):
        labels(str(tmp_path / "set"))
