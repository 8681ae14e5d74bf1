"""What the trainer relies on, of data in memory and of streams alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.data import Batch, BatchPlan, Dataset, open_dataset
from distill.data.imbalance import balanced_draws
from distill.data.randomness import permutation
from distill.errors import InputError
from distill.recipe import Data

CPU = torch.device("cpu")
AUGMENT = {"crop_padding": 2, "hflip": True, "random_erasing": 0.3, "mixup": 0.8, "cutmix": 1.0}
CROP = {"random_resized_crop": {}, "hflip": True, "mixup": 0.8}


@pytest.fixture(params=["digits", "balanced digits", "packed folder", "stream", "balanced stream in one process"])
def spec(request: pytest.FixtureRequest, make_folder: Any) -> Data:
    if request.param == "digits":
        return Data(name="digits", validation=0.1, augment=AUGMENT)
    if request.param == "balanced digits":
        return Data(name="digits", validation=0.1, augment=AUGMENT, sampler="balanced")
    root = str(make_folder())
    if request.param == "packed folder":
        return Data(name="folder", root=root, resolution=12, validation=6, augment=AUGMENT)
    keys: dict[str, Any] = {"workers": 2} if request.param == "stream" else {"workers": 0, "sampler": "balanced"}
    return Data(name="folder", root=root, resolution=12, validation=6, augment=CROP, stream=True, **keys)


def opened(spec: Data, **arguments: Any) -> Dataset:
    return open_dataset(spec, seed=5, device=CPU, **arguments)


def joined(parts: list[Batch]) -> Batch:
    *tensors, views = zip(*parts, strict=True)
    return Batch(*map(torch.cat, tensors), tuple(map(torch.cat, zip(*views, strict=True))))


def assert_same(left: Batch, right: Batch) -> None:
    for name, one, other in zip(Batch._fields[:-1], left[:-1], right[:-1], strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(one, other) for one, other in zip(left.views, right.views, strict=True))


def test_shapes_types_and_ranges(spec: Data) -> None:
    dataset = opened(spec)
    info = dataset.info
    size = 8 if spec.name == "digits" else 12
    channels = 1 if spec.name == "digits" else 3
    assert (info.channels, len(info.mean), len(info.std)) == (channels, channels, channels)
    steps = list(dataset.training_batches(BatchPlan(0, 8, accumulation=2), epoch=0))
    assert len(steps) == info.sizes["train"] // 8
    for step in steps:
        assert len(step) == 2
        for batch in step:
            assert batch.images.shape == (4, channels, size, size)
            assert batch.images.dtype == batch.targets.dtype == torch.float32
            assert 0 <= batch.images.min() <= batch.images.max() <= 1
            assert batch.targets.shape == (4, info.num_classes)
            torch.testing.assert_close(batch.targets.sum(1), torch.ones(4))
            assert batch.labels.dtype == batch.indices.dtype == torch.int64
            assert torch.equal(batch.labels, dataset.labels("train")[batch.indices])


def test_an_epoch_is_its_order(spec: Data) -> None:
    dataset = opened(spec)
    for epoch in (0, 1):
        batches = [joined(step) for step in dataset.training_batches(BatchPlan(9, 8), epoch)]
        size = dataset.info.sizes["train"]
        drawn = None if spec.sampler is None else balanced_draws(dataset.labels("train"), 9, epoch) % size
        order = permutation(9, epoch, size) if drawn is None else drawn
        assert torch.equal(joined(batches).indices, order[: len(batches) * 8])


def test_views_are_functions_of_their_number() -> None:
    """The first is what there is without further ones, whatever the batch and wherever one starts."""
    spec = Data(name="digits", augment={"crop_padding": 2, "hflip": True, "mixup": 0.8})
    alone, several = opened(spec), opened(spec)
    several.set_views(3)
    one = next(iter(alone.training_batches(BatchPlan(0, 16), 1, 2)))
    three = next(iter(several.training_batches(BatchPlan(0, 16), 1, 2)))
    assert_same(joined(one), joined(three)._replace(views=()))
    again = list(several.training_batches(BatchPlan(0, 8), 1))[4:6]
    assert_same(joined(three), joined(again[0] + again[1]))
    views = [joined(three).images, *joined(three).views]
    assert len(views) == 3
    assert all(not torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_processes_and_micro_batches_change_nothing(spec: Data) -> None:
    whole = list(opened(spec).training_batches(BatchPlan(0, 8), epoch=3))
    ranks = [opened(spec, num_processes=2, process_index=rank) for rank in range(2)]
    shares = [
        list(dataset.training_batches(BatchPlan(0, 8, 2, 2, rank), epoch=3)) for rank, dataset in enumerate(ranks)
    ]
    assert len(whole) == len(shares[0]) == len(shares[1]) >= 3
    for step, first, second in zip(whole, *shares, strict=True):
        assert_same(joined(step), joined(first + second))


def test_starting_in_mid_epoch_goes_on_as_before(spec: Data) -> None:
    dataset = opened(spec)
    plan = BatchPlan(0, 8)
    whole = list(dataset.training_batches(plan, epoch=1))
    interrupted = dataset.training_batches(plan, epoch=1)
    next(interrupted)
    rest = list(dataset.training_batches(plan, epoch=1, first_step=2))
    afresh = list(opened(spec).training_batches(plan, epoch=1, first_step=2))
    assert len(rest) == len(whole) - 2
    for step, one, other in zip(whole[2:], rest, afresh, strict=True):
        assert_same(joined(step), joined(one))
        assert_same(joined(step), joined(other))
    assert not list(dataset.training_batches(plan, epoch=1, first_step=len(whole)))


def test_a_plan_that_does_not_fit_is_an_error_at_once(spec: Data) -> None:
    dataset = opened(spec)
    with pytest.raises(InputError, match=r"train\.batch_size: 5 .* pairs"):
        dataset.training_batches(BatchPlan(0, 5), epoch=0)
    with pytest.raises(InputError, match=r"train\.batch_size: 4000 is more"):
        dataset.training_batches(BatchPlan(0, 4000), epoch=0)


def evaluated(dataset: Dataset, split: Any, batch_size: int, cuts: list[int]) -> tuple[Tensor, Tensor]:
    parts = []
    for start, stop in pairwise(cuts):
        parts += list(dataset.evaluation_batches(split, start, stop, batch_size))
    images, labels = zip(*parts, strict=True)
    assert max(map(len, images)) <= batch_size
    return torch.cat(images), torch.cat(labels)


def test_evaluation_is_plain_and_in_file_order_however_it_is_cut(spec: Data) -> None:
    dataset = opened(spec)
    for split in ("train", "validation", "test"):
        size = dataset.info.sizes[split]
        images, labels = evaluated(dataset, split, 7, [0, size])
        assert len(images) == size > 0
        assert torch.equal(labels, dataset.labels(split))
        again, same = evaluated(dataset, split, 4, [0, 1, size // 2, size + 100])
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
        assert torch.equal(images * 255, (images * 255).round())
    assert not list(dataset.evaluation_batches("test", 5, 5, 4))


def test_evaluation_amid_an_epoch_does_not_disturb_it(spec: Data) -> None:
    dataset = opened(spec)
    plain = list(dataset.training_batches(BatchPlan(0, 8), epoch=0))
    for step, expected in zip(dataset.training_batches(BatchPlan(0, 8), epoch=0), plain, strict=True):
        assert_same(joined(step), joined(expected))
        list(dataset.evaluation_batches("validation", 0, 4, 2))


def test_validation_is_held_out_of_train(spec: Data) -> None:
    dataset = opened(spec)
    without = opened(spec.model_copy(update={"validation": 0.0}))
    assert without.info.sizes["validation"] == 0
    assert without.labels("validation").tolist() == []
    assert not list(without.evaluation_batches("validation", 0, 10, 2))
    sizes = dataset.info.sizes
    assert sizes["train"] + sizes["validation"] == without.info.sizes["train"]
    rows = {tuple(image.flatten().tolist()) for image, *_ in evaluated_rows(without, "train")}
    train = {tuple(image.flatten().tolist()) for image, *_ in evaluated_rows(dataset, "train")}
    held_out = {tuple(image.flatten().tolist()) for image, *_ in evaluated_rows(dataset, "validation")}
    assert train | held_out == rows
    assert not train & held_out
    assert dataset.info.digest == without.info.digest
    on_test = opened(spec.model_copy(update={"validation": 0.0, "select_on": "test"}))
    assert on_test.info.sizes == without.info.sizes


def evaluated_rows(dataset: Dataset, split: Any) -> list[tuple[Tensor, ...]]:
    images, labels = evaluated(dataset, split, 64, [0, dataset.info.sizes[split]])
    return list(zip(images, labels, strict=True))


def test_global_random_state_is_left_alone(spec: Data) -> None:
    state = torch.get_rng_state()
    dataset = opened(spec)
    list(dataset.training_batches(BatchPlan(0, 8), epoch=0))
    list(dataset.evaluation_batches("test", 0, 4, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_statistics_of_data_in_memory_are_those_of_the_training_split() -> None:
    dataset = opened(Data(name="digits", validation=0.1))
    images, _ = evaluated(dataset, "train", 500, [0, dataset.info.sizes["train"]])
    exact = images.double().mul(255).round() / 255
    assert dataset.info.mean == pytest.approx((exact.mean().item(),), rel=1e-12)
    assert dataset.info.std == pytest.approx((exact.std(correction=0).item(),), rel=1e-12)


@pytest.mark.shared
def test_cifar10(cifar10_root: Path) -> None:
    dataset = opened(Data(name="cifar10", root=str(cifar10_root), augment={"crop_padding": 4, "hflip": True}))
    assert dataset.info.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert torch.bincount(dataset.labels("validation")).tolist() == [500] * 10
    assert dataset.info.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    assert dataset.info.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)
    first = next(dataset.training_batches(BatchPlan(0, 128), epoch=0))[0]
    assert first.images.shape == (128, 3, 32, 32)
    by_file = opened(Data(name="cifar10.safetensors", root=str(cifar10_root)))
    assert by_file.info == dataset.info
    path = str(cifar10_root / "cifar10.safetensors")
    assert opened(Data(name=path, root="nowhere")).info == dataset.info
