"""timm's datasets, with stand-ins for what their packages would give."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import data as torch_data

from distill.data import BatchPlan, checked, open_dataset, sequential
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((9, 9 + number % 3, 3), number % 256, dtype=np.uint8))


def spec(name: str, root: Path, **values: Any) -> Data:
    return Data(name=name, root=str(root), **({"resolution": 6, "validation": 0.0, "workers": 0} | values))


class Shards(torch_data.IterableDataset):
    """As timm's IterableImageDataset over shards: each worker reads every n-th sample; the epoch shifts the order."""

    def __init__(self, count: int, announced: int | None = None) -> None:
        self.count, self.epoch = count, 0
        self.reader = SimpleNamespace(
            num_samples=announced or count, class_to_idx=None, dist_rank=1, dist_num_replicas=2
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_loader_cfg(self, num_workers: int) -> None: ...

    def __iter__(self) -> Any:
        worker = torch_data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        assert self.reader.dist_num_replicas in (1, 2)
        for row in range(first, self.count, step):
            yield picture((row + self.epoch) % 256), (row + self.epoch) % 4


def shards(monkeypatch: pytest.MonkeyPatch, train: int = 40, test: int = 10, announced: int | None = None) -> None:
    def create(name: str, root: Path, split: str, **_: Any) -> Any:
        return Shards(train, announced) if split == "train" else Shards(test)

    monkeypatch.setattr(sequential, "create", create)


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int) -> None:
    shards(monkeypatch)
    crop = {"random_resized_crop": {}, "mixup": 0.8}
    dataset = open_dataset(spec("wds/x", tmp_path, workers=workers, augment=crop), seed=0, device=CPU)
    assert dataset.info.sizes == {"train": 40, "validation": 0, "test": 10}
    assert dataset.info.num_classes == 4
    plan = BatchPlan(0, 8, accumulation=2)
    whole = list(dataset.training_batches(plan, epoch=1))
    assert len(whole) == 5
    assert torch.cat([batch.indices for step in whole for batch in step]).tolist() == list(range(40))
    later = list(dataset.training_batches(plan, epoch=1, first_step=3))
    for step, again in zip(whole[3:], later, strict=True):
        for one, other in zip(step, again, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one[:4], other[:4], strict=True))
    assert dataset.labels("test").tolist() == [row % 4 for row in range(10)]
    images, labels = zip(*dataset.evaluation_batches("test", 3, 99, 4), strict=True)
    assert torch.cat(labels).tolist() == [row % 4 for row in range(3, 10)]
    assert (torch.cat(images) * 255)[:, 0, 0, 0].round().tolist() == list(range(3, 10))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_a_sequential_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int) -> None:
    shards(monkeypatch)
    views = [{"kind": "global", "size": 6}, {"kind": "local", "size": 3, "count": 2}]
    dataset = open_dataset(spec("wds/x", tmp_path, workers=workers, views=views), seed=0, device=CPU)
    dataset.set_views("all")
    plan = BatchPlan(0, 8, accumulation=2)
    whole = list(dataset.training_batches(plan, epoch=1))
    again = list(dataset.training_batches(plan, epoch=1, first_step=3))
    assert [view.shape for view in (whole[0][0].images, *whole[0][0].views)] == [
        (4, 3, side, side) for side in (6, 3, 3)
    ]
    for step, later in zip(whole[3:], again, strict=True):
        for one, other in zip(step, later, strict=True):
            assert torch.equal(one.images, other.images)
            assert all(torch.equal(*pair) for pair in zip(one.views, other.views, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_is_short_is_found_when_it_is_opened(
    split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards(monkeypatch, train=20, announced=40)
    if split == "test":
        made = {"train": Shards(40), "validation": Shards(9, 10)}
        monkeypatch.setattr(sequential, "create", lambda name, root, split, **_: made[split])
    name, found, announced = ("train", 20, 40) if split == "train" else ("validation", 9, 10)
    with pytest.raises(InputError, match=f"split {name} of 'wds/x' yields {found} images, {announced} are announced"):
        open_dataset(spec("wds/x", tmp_path), seed=0, device=CPU)


def test_a_sample_that_cannot_be_decoded_is_found_when_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Shards):
        def __iter__(self) -> Any:
            for row, (image, label) in enumerate(super().__iter__()):
                yield (b"no image" if row == 7 else image), label

    monkeypatch.setattr(sequential, "create", lambda *_, **__: Broken(10))
    with pytest.raises(InputError, match=r"split train, image 7: .*cannot be decoded") as caught:
        open_dataset(spec("wds/x", tmp_path), seed=0, device=CPU)
    assert "\n" not in str(caught.value)


def test_all_are_read_once_until_a_file_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[str] = []

    def create(name: str, root: Path, split: str, **_: Any) -> Any:
        source = Shards(40 if split == "train" else 10)
        source.reader.split_info = SimpleNamespace(filenames=(f"{split}.tar",), shard_lengths=())
        return source

    def samples(source: Any, name: str) -> Any:
        read.append(name)
        return ((image, name, label) for image, label in source)

    monkeypatch.setattr(sequential, "create", create)
    monkeypatch.setattr(checked, "samples", samples)
    (tmp_path / "train.tar").write_bytes(b"1")
    data = spec("wds/x", tmp_path, cache=str(tmp_path / "cache"))
    before = open_dataset(data, seed=0, device=CPU).info
    assert before.pixels == "9 to 11 pixels wide, 9 high"
    assert open_dataset(data, seed=0, device=CPU).info == before
    assert len(read) == 2, "each split once"
    (tmp_path / "train.tar").write_bytes(b"2")
    os.utime(tmp_path / "train.tar", ns=(0, 0))
    assert open_dataset(data, seed=0, device=CPU).info.digest != before.digest
    assert len(read) == 4


class TestWebdataset:
    """Real shards. Needs the package webdataset."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        pytest.importorskip("webdataset")
        splits = {}
        for split, count in (("train", 12), ("validation", 6)):
            lengths = []
            for shard in range(2):
                lengths.append(count // 2)
                with tarfile.open(tmp_path / f"{split}-{shard}.tar", "w") as tar:
                    for number in range(count // 2):
                        file = io.BytesIO()
                        picture(shard * 100 + number).save(file, "JPEG" if shard else "PNG")
                        suffix = "jpeg" if shard else "png"
                        for name, content in (
                            (f"{number}.{suffix}", file.getvalue()),
                            (f"{number}.cls", b"%d" % shard),
                        ):
                            member = tarfile.TarInfo(name)
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
            names = [f"{split}-{shard}.tar" for shard in range(2)]
            splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": count}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
        return tmp_path

    def problem(self, root: Path) -> str:
        with pytest.raises(InputError) as caught:
            open_dataset(spec("wds/x", root), seed=0, device=CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_all_samples_are_read(self, root: Path) -> None:
        dataset = open_dataset(spec("wds/x", root), seed=0, device=CPU)
        assert dataset.labels("test").tolist() == [0, 0, 0, 1, 1, 1]
        ((images, labels),) = dataset.evaluation_batches("test", 0, 6, 6)
        assert (images[:, 0, 0, 0] * 255).tolist() == pytest.approx([0, 1, 2, 100, 101, 102], abs=1)  # some are JPEG
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]

    def test_what_is_broken_or_missing_is_named(self, root: Path) -> None:
        shard = root / "validation-1.tar"
        intact = shard.read_bytes()
        begins, spoilt = b"\xff\xd8\xff", b"\xff\xd8\x00"
        shard.write_bytes(intact.replace(begins, spoilt, 2).replace(spoilt, begins, 1))  # the second image
        message = self.problem(root)
        assert f"split validation, image 4: wds/x: {shard}, 1.jpeg: cannot be decoded" in message
        shard.write_bytes(intact[: len(intact) // 3])
        words = f"split validation of 'wds/x' yields 4 images, 6 are announced (shard {shard}: 1 of 3)"
        assert words in self.problem(root)
        (root / "_info.json").unlink()
        assert "there is no _info.json" in self.problem(root)
