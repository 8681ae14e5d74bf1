"""Weights of classes, balanced draws and long tails, against scikit-learn, published code and counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from distill.data import BatchPlan, open_dataset
from distill.data.facts import facts
from distill.data.imbalance import balanced_draws, class_weights, long_tail
from distill.errors import InputError
from distill.recipe import Data

COUNTS = (40, 7, 3)
NAMES = ("a", "b", "c")
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    found = class_weights(Data(class_weights="balanced"), NAMES, COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    assert found == pytest.approx(expected, rel=1e-12)
    # A class without images is left out of the number of classes, as there.
    with_empty = class_weights(Data(class_weights="balanced"), (*NAMES, "d"), (*COUNTS, 0))
    assert with_empty is not None
    assert with_empty[:3] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_the_mean_weight_of_what_is_drawn_is_one(factor: float) -> None:
    given = [factor * weight for weight in (1.0, 2.0, 4.0)]
    found = class_weights(Data(class_weights=given), NAMES, COUNTS)
    assert found == pytest.approx([weight * 50 / (40 + 14 + 12) for weight in (1, 2, 4)], rel=1e-12)
    drawn = class_weights(Data(class_weights=given, sampler="balanced"), NAMES, COUNTS)
    assert drawn == pytest.approx([3 / 7, 6 / 7, 12 / 7], rel=1e-12)


def test_other_numbers_of_weights_than_classes() -> None:
    with pytest.raises(InputError, match=r"^data\.class_weights: 2 weights for 3 classes; .* each of a, b, c$"):
        class_weights(Data(class_weights=[1.0, 2.0]), NAMES, COUNTS)
    with pytest.raises(InputError, match="does not count"):
        class_weights(Data(class_weights="balanced"), NAMES, ())
    assert class_weights(Data(), NAMES, ()) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 2**31 - 1), st.integers(1, 8))
def test_classes_are_drawn_equally_often(sizes: list[int], seed: int, epochs: int) -> None:
    """Over any number of epochs, to one draw; so are the images of a class, and no draw of an epoch comes twice."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    by_epoch = [balanced_draws(labels, seed, epoch) for epoch in range(epochs)]
    assert torch.equal(by_epoch[-1], balanced_draws(labels, seed, epochs - 1))
    assert all(len(draws.unique()) == len(draws) == len(labels) for draws in by_epoch)
    images = torch.cat(by_epoch) % len(labels)
    of_class = torch.bincount(labels[images], minlength=len(sizes))
    assert of_class.max() - of_class.min() <= 1
    times = torch.bincount(images, minlength=len(labels))
    for label in range(len(sizes)):
        assert times[labels == label].max() - times[labels == label].min() <= 1


def test_draws_are_shuffled_and_differ_by_seed_and_epoch() -> None:
    labels = torch.arange(4000) // 1000
    orders = [balanced_draws(labels, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    for order in orders:
        drawn = labels[order % 4000].double()
        assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 0.08
        assert torch.bincount(labels[order[:2000] % 4000]).min() > 430


def tailed(**keys: Any) -> Data:
    return Data(name="digits", **{"validation": 0.2, "long_tail": 20, "sampler": "balanced", **keys})


def test_an_image_that_is_drawn_again_is_augmented_anew() -> None:
    dataset = open_dataset(tailed(augment={"crop_padding": 2}), seed=0, device=torch.device("cpu"))
    (batch,) = next(dataset.training_batches(BatchPlan(0, dataset.info.sizes["train"]), epoch=2))
    assert dataset.steps_per_epoch(BatchPlan(0, 32)) == dataset.info.sizes["train"] // 32
    often = Counter(batch.indices.tolist()).most_common(1)[0][0]
    same = batch.images[batch.indices == often]
    assert dataset.labels("train")[often] == 9
    assert len(same) > 5
    assert len({image.numpy().tobytes() for image in same}) > 3
    counts = torch.bincount(batch.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_a_long_tail_has_the_counts_of_the_paper() -> None:
    """As in the code of Cui et al., int(n * imb_factor ** (c / (k - 1)))."""
    labels = torch.arange(50_000) * 7 % 10
    kept = long_tail(labels, 100, 0, torch.arange(50_000))
    assert torch.bincount(labels[kept]).tolist() == [int(5000 * 0.01 ** (label / 9)) for label in range(10)]
    assert torch.equal(kept, kept.sort().values)
    fewer, other = (long_tail(labels, factor, seed, torch.arange(50_000)) for factor, seed in ((200, 0), (100, 1)))
    assert set(fewer.tolist()) < set(kept.tolist())
    assert not torch.equal(kept, other)
    some = long_tail(labels[100:], 100, 0, torch.arange(100, 50_000))
    assert len(set((some + 100).tolist()) & set(kept.tolist())) > 0.95 * len(some)
    with pytest.raises(InputError, match=r"^data\.long_tail: 6000 .* at most 5000$"):
        long_tail(labels, 6000, 0, torch.arange(50_000))


def test_validation_and_test_stay_whole_and_the_run_says_what_is_left() -> None:
    tail, whole = (open_dataset(tailed(long_tail=factor), seed=0, device=torch.device("cpu")) for factor in (20, None))
    for split in ("validation", "test"):
        assert torch.equal(tail.labels(split), whole.labels(split))
    assert tail.info.digest == whole.info.digest, "of the same files"
    assert list(tail.info.class_images) == torch.bincount(tail.labels("train")).tolist()
    assert tail.info.sizes["train"] == sum(tail.info.class_images) < whole.info.sizes["train"]
    told = dict(facts(tail.info, tailed(sampler=None, class_weights="balanced")))
    most, least = max(tail.info.class_images), min(tail.info.class_images)
    assert told["balance"] == f"{least} (9) to {most} (0) labelled training images a class (data.long_tail=20)"
    assert told["weights"].startswith(f"{sum(tail.info.class_images) / 10 / most:.3g} (0) to ")
    assert "equally often" in dict(facts(tail.info, tailed()))["sampler"]
    assert not {"balance", "weights", "sampler"} & dict(facts(whole.info, Data(name="digits"))).keys()


def test_streams_draw_like_data_in_memory(make_folder: Any) -> None:
    root: Path = make_folder()
    orders = []
    for stream in (False, True):
        spec = Data(
            name="folder", root=str(root), resolution=12, validation=0, stream=stream, workers=0, long_tail=4,
            sampler="balanced",
        )  # fmt: skip
        dataset = open_dataset(spec, seed=1, device=torch.device("cpu"))
        batches = [batch for (batch,) in dataset.training_batches(BatchPlan(0, 7), 1)]
        orders.append(torch.cat([batch.indices for batch in batches]).tolist())
        for batch in batches:
            assert torch.equal(batch.labels, dataset.labels("train")[batch.indices])
    assert orders[0] == orders[1]


def test_images_without_labels_come_as_they_are() -> None:
    spec = tailed(labelled=0.5, unlabelled_share=0.5)
    dataset = open_dataset(spec, seed=0, device=torch.device("cpu"))
    plan = BatchPlan(0, 40)
    steps = [batch for (batch,) in dataset.training_batches(plan, 0)]
    labels, indices = (torch.cat([getattr(batch, name) for batch in steps]) for name in ("labels", "indices"))
    known = labels >= 0
    counts = torch.bincount(labels[known], minlength=10)
    assert counts.max() - counts.min() <= 12, "each pass drops an incomplete batch"
    others = indices[~known] - dataset.info.sizes["train"]
    assert 0 <= others.min() <= others.max() < dataset.info.unlabelled
    times = torch.bincount(others)
    assert times.max() - times.min() <= 1
