"""timm's datasets, with stand-ins for what their packages would give."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import data as torch_data

from distill.data import BatchPlan, open_dataset, sequential, timm_sets
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((9, 9 + number % 3, 3), number % 256, dtype=np.uint8))


class HubReader:
    """As timm's ReaderHfds: encoded images, and a table with a column of labels."""

    def __init__(self, labels: list[int]) -> None:
        self.label_key = "fine"
        self.dataset = {"fine": labels}
        self.class_to_idx = {"dog": 1, "cat": 0}

    def __getitem__(self, row: int) -> tuple[io.BytesIO, int]:
        buffer = io.BytesIO()
        picture(row).save(buffer, "PNG")
        return io.BytesIO(buffer.getvalue()), self.dataset["fine"][row]


def hub(monkeypatch: pytest.MonkeyPatch, **splits: list[int]) -> None:
    def create(name: str, root: Path, split: str, **_: Any) -> Any:
        if split not in splits:
            raise InputError(f"data.name: timm cannot open split '{split}' of '{name}'")
        return SimpleNamespace(reader=HubReader(splits[split]))

    monkeypatch.setattr(timm_sets, "create", create)


def spec(name: str, root: Path, **values: Any) -> Data:
    return Data(name=name, root=str(root), **({"resolution": 6, "validation": 0.0, "workers": 0} | values))


def test_random_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, train=[row % 2 for row in range(20)], test=[0, 1, 1])
    dataset = open_dataset(spec("hfds/x", tmp_path, validation=0.2), seed=0, device=CPU)
    assert dataset.info.class_names == ("cat", "dog")
    assert dataset.info.sizes == {"train": 16, "validation": 4, "test": 3}
    assert dataset.labels("test").tolist() == [0, 1, 1]
    ((images, labels),) = dataset.evaluation_batches("test", 0, 3, 8)
    assert (images * 255)[:, 0, 0, 0].round().tolist() == [0, 1, 2]
    assert labels.tolist() == [0, 1, 1]
    (batch,) = next(dataset.training_batches(BatchPlan(0, 16), epoch=0))
    assert torch.equal(batch.labels, dataset.labels("train")[batch.indices])


def test_a_test_split_without_labels_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, train=[0, 1] * 5, test=[-1, -1, -1], validation=[0, 1])
    assert open_dataset(spec("hfds/x", tmp_path), seed=0, device=CPU).info.sizes["test"] == 2
    hub(monkeypatch, train=[0, 1] * 5, test=[1, 0, 1], validation=[0, 1])
    sizes = open_dataset(spec("hfds/x", tmp_path, validation=0.1), seed=0, device=CPU).info.sizes
    assert sizes == {"train": 10, "validation": 2, "test": 3}
    hub(monkeypatch, train=[0, 1] * 5, test=[-1])
    with pytest.raises(InputError, match="validation"):
        open_dataset(spec("hfds/x", tmp_path), seed=0, device=CPU)


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


def test_a_reader_that_ends_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shards(monkeypatch, train=20, announced=40)
    dataset = open_dataset(spec("wds/x", tmp_path), seed=0, device=CPU)
    with pytest.raises(InputError, match="ended in step 2 of the epoch"):
        list(dataset.training_batches(BatchPlan(0, 8), epoch=0))
